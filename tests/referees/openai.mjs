// Asks at base_url as users of npm's openai do, and prints what each call answered.

import { pathToFileURL } from "node:url";

const { default: OpenAI } = await import(pathToFileURL(`${process.env.SDK}/index.mjs`));
const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: process.env.API_KEY, maxRetries: 0 });
const ask = { model: "gpt-5.4-mini", messages: [{ role: "user", content: "hi there" }] };

const whole = await client.chat.completions.create(ask);
const said = [];
for await (const chunk of await client.chat.completions.create({ ...ask, stream: true })) {
  said.push(chunk.choices[0].delta.content ?? null);
}
const models = [];
for await (const model of client.models.list()) models.push(model.id);
const refused = await client.models.retrieve("nobody").catch(({ status, code }) => [status, code]);

const line = (custom_id, body) =>
  JSON.stringify({ custom_id, method: "POST", url: "/v1/chat/completions", body });
const content = [line("a", ask), line("b", { ...ask, stream: true })].join("\n");
const file = await client.files.create({ file: new File([content], "asked.jsonl"), purpose: "batch" });
const text = await (await client.files.content(file.id)).text();
const begun = await client.batches.create({
  input_file_id: file.id,
  endpoint: "/v1/chat/completions",
  completion_window: "24h",
});
const batch = await client.batches.cancel(begun.id);
const listed = [];
for await (const each of client.batches.list({ limit: 1 })) listed.push(each.id === begun.id);
const batches = {
  same: text === content,
  status: batch.status.startsWith("cancel"),
  total: batch.request_counts.total,
  listed,
  deleted: (await client.files.delete(file.id)).deleted,
};
console.log(JSON.stringify({ batches, whole: whole.choices[0].message.content, said, models, refused }));

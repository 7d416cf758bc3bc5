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
console.log(JSON.stringify({ whole: whole.choices[0].message.content, said, models, refused }));

// Calls what its argument names of @upstash/qstash, every method of it in one section or another,
// and prints what each call answered. test_node.py says what that has to be.

import { createServer } from "node:http";
import { pathToFileURL } from "node:url";

const { Client, Receiver, anthropic, custom, openai, upstash } = await import(
  pathToFileURL(`${process.env.SDK}/index.mjs`)
);

// --- where messages are delivered ---------------------------------------------------------------

const received = [];
const destination = createServer(async (request, response) => {
  const chunks = [];
  for await (const chunk of request) chunks.push(chunk);
  const body = Buffer.concat(chunks).toString();
  received.push({ method: request.method, url: request.url, headers: request.headers, body });
  response.sendDate = false;
  if (request.url.startsWith("/busy")) {
    response.writeHead(503, { "Content-Type": "text/plain", "X-Busy": "1" });
    response.end("busy");
  } else {
    response.writeHead(200, { "Content-Type": "application/json" });
    response.end('{"ok":true}');
  }
});
await new Promise((resolve) => destination.listen(0, "127.0.0.1", resolve));
const base = `http://127.0.0.1:${destination.address().port}`;
const later = `${base}/later`;

// --- what is offered, and what was called of it -------------------------------------------------

const offered = new Set();
const called = new Set();
// Private in the SDK's types.
const hidden = ["constructor", "verifyWithKey", "verifyBodyAndUrl", "createThirdParty"];
hidden.push("getAuthorizationToken");

function watched(name, api) {
  const names = [...Object.keys(api), ...Object.getOwnPropertyNames(Object.getPrototypeOf(api))];
  const getters = Object.getOwnPropertyDescriptors(Object.getPrototypeOf(api));
  for (const method of names) {
    if (getters[method]?.get || hidden.includes(method)) continue;
    if (typeof api[method] === "function") offered.add(`${name}.${method}`);
  }
  return new Proxy(api, {
    get(target, key) {
      const value = target[key];
      if (typeof value !== "function") return value;
      return (...given) => {
        const noted = (answer) => (called.add(`${name}.${key}`), answer);
        const answer = value.apply(target, given);
        return answer?.then ? answer.then(noted) : noted(answer);
      };
    },
  });
}

const plain = new Client({ retry: false, headers: { "X-Global": "g" } });
const client = watched("client", plain);
const messages = watched("messages", client.messages);
const dlq = watched("dlq", client.dlq);
const schedules = watched("schedules", client.schedules);
const urlGroups = watched("urlGroups", client.urlGroups);
const flowControl = watched("flowControl", client.flowControl);
const workflow = watched("workflow", client.workflow);
const chat = watched("chat", client.chat());
const queue = (queueName) => watched("queue", client.queue({ queueName }));
const receiver = watched("receiver", new Receiver());
queue("q");

// --- help ----------------------------------------------------------------------------------------

const answers = {};
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

async function until(isSo) {
  for (let end = Date.now() + 15_000; !(await isSo()); await sleep(20)) {
    if (Date.now() > end) throw new Error(`it never came to that: ${isSo}`);
  }
}

const ended = (messageId, state) =>
  until(async () => {
    const { logs } = await plain.logs({ filter: { messageId } });
    return logs[0]?.state === state;
  });

async function refusal(call) {
  try {
    return { answered: await call() };
  } catch (error) {
    return { name: error.name, status: error.status, message: error.message };
  }
}

async function dead(options = {}) {
  const publish = { url: `${base}/busy`, body: "x", retries: 0, ...options };
  const { messageId } = options.queue
    ? await plain.queue({ queueName: options.queue }).enqueue(publish)
    : await plain.publish(publish);
  await ended(messageId, "FAILED");
  return messageId;
}

const everything = {
  method: "PUT",
  headers: { "Content-Type": "text/plain", "X-Trace": "t", "Upstash-Forward-X-Other": "o, p" },
  callback: `${base}/callback`,
  failureCallback: `${base}/failure`,
  retries: 2,
  retryDelay: "1000 * (1 + retried)",
  timeout: 30,
  label: ["a", "b"],
};
const flow = { key: "k", parallelism: 3, rate: 4, period: "1m30s" };
const yearly = "0 0 1 1 *";

// --- the sections --------------------------------------------------------------------------------

const sections = {
  async publish() {
    const { messageId } = (answers.publish = await client.publish({
      url: `${later}?x=1`,
      body: "héllo",
      delay: "1h",
      flowControl: flow,
      ...everything,
    }));
    answers.get = await messages.get(messageId);
    const bare = await client.publish({ url: later, delay: 60 });
    answers.bare = await messages.get(bare.messageId);
    const redacted = await client.publish({
      url: later,
      body: "b",
      delay: 60,
      headers: { Authorization: "k", "X-Trace": "t" },
      redact: { body: true, header: ["Authorization"] },
    });
    answers.redacted = await messages.get(redacted.messageId);
    const moment = Math.floor(Date.now() / 1000) + 600;
    const dated = await client.publishJSON({ url: later, notBefore: moment });
    answers.dated = (await messages.get(dated.messageId)).notBefore - moment * 1000;
    const twice = { url: later, body: { n: 1 }, delay: "1h", deduplicationId: "one_-.1" };
    answers.first = await client.publishJSON(twice);
    answers.again = await client.publishJSON(twice);
    const same = { url: later, body: "same", delay: "1h", contentBasedDeduplication: true };
    answers.firstSame = await client.publish(same);
    answers.againSame = await client.publish(same);
  },

  async delivery() {
    const url = `${base}/a%2Fb//c?x=1&y=%20`;
    const { messageId } = (answers.publishJSON = await client.publishJSON({
      ...everything,
      url,
      body: { n: "é" },
      delay: undefined,
    }));
    await ended(messageId, "DELIVERED");
    await until(() => received.some((each) => each.url === "/callback"));
    answers.verified = [];
    answers.refused = [];
    for (const request of received) {
      const [signature, upstashRegion] = [
        request.headers["upstash-signature"],
        request.headers["upstash-region"],
      ];
      const sent = { signature, upstashRegion, body: request.body, url: base + request.url };
      answers.verified.push(await receiver.verify(sent));
      answers.refused.push(await refusal(() => receiver.verify({ ...sent, body: "forged" })));
      answers.refused.push(await refusal(() => receiver.verify({ ...sent, url: later })));
    }
  },

  async providers() {
    const body = { model: "m", messages: [{ role: "user", content: "hi" }] };
    const callback = `${base}/callback`;
    const told = async (provider, analytics) => {
      const { messageId } = await client.publishJSON({
        api: { name: "llm", provider, analytics },
        body,
        callback,
        delay: "1h",
      });
      const { url, header } = await messages.get(messageId);
      return { url, header };
    };
    answers.openai = await told(openai({ token: "sk-1", organization: "org" }));
    answers.anthropic = await told(anthropic({ token: "ant-1" }));
    answers.custom = await told(custom({ baseUrl: "https://a.test", token: "c-1" }));
    answers.helicone = await told(openai({ token: "sk-1" }), { name: "helicone", token: "h-1" });
    const hosted = { api: { name: "llm", provider: upstash() }, body, callback };
    answers.hosted = await client.publishJSON(hosted);
    await ended(answers.hosted.messageId, "DELIVERED");
    await until(() => received.some((each) => each.url === "/callback"));
  },

  async batch() {
    const one = { url: later, delay: "1h", flowControl: flow, ...everything };
    const two = { url: later, queueName: "q" };
    const three = { url: later, delay: 60, deduplicationId: "one" };
    await queue("q").upsert({ paused: true });
    const texts = ["0", "1", "2", "3"];
    answers.batch = await client.batch(
      [one, two, three, three].map((item, n) => ({ ...item, body: texts[n] }))
    );
    answers.batchTold = [];
    for (const { messageId } of answers.batch) answers.batchTold.push(await messages.get(messageId));
    answers.batchJSON = await client.batchJSON([
      { ...two, body: { n: 1 }, headers: { "X-Trace": "t" } },
      { ...one, body: { n: 2 } },
      { url: "no-such-group", body: {} },
    ]);
    answers.batchJSONTold = [];
    for (const { messageId } of answers.batchJSON.slice(0, 2)) {
      answers.batchJSONTold.push(await messages.get(messageId));
    }
    answers.single = await client.batch([{ url: later, delay: 60 }]);
  },

  async cancelling() {
    const some = async (count, options = {}) => {
      const ids = [];
      for (let n = 0; n < count; n++) {
        const { messageId } = await client.publish({ url: later, delay: "1h", ...options });
        ids.push(messageId);
      }
      return ids;
    };
    const ids = await some(8);
    answers.one = await messages.cancel(ids[0]);
    answers.oneAgain = await refusal(() => messages.cancel(ids[0]));
    answers.getCancelled = await refusal(() => messages.get(ids[0]));
    answers.deleted = (await messages.delete(ids[1])) ?? null;
    answers.many = await messages.cancel([ids[0], ids[2], ids[3]]);
    answers.byIds = await messages.cancel({ messageIds: [ids[4]] });
    answers.none = await messages.cancel([]);
    answers.deleteMany = await messages.deleteMany([ids[4], ids[5]]);
    await some(1, { label: "a", flowControl: flow });
    await some(1, { label: ["b", "c"] });
    answers.byLabel = await messages.cancel({ filter: { label: ["c", "a"] } });
    await some(1, { flowControl: flow });
    answers.byFlow = await messages.cancel({ filter: { flowControlKey: "k", host: "127.0.0.1" } });
    answers.byUrl = await messages.cancel({ filter: { url: "http://other.test/", queueName: "q" } });
    answers.byDate = await messages.cancel({
      filter: { fromDate: new Date(0), toDate: new Date(1), callerIp: "127.0.0.1", path: "/later" },
    });
    answers.misspelt = await refusal(() => messages.cancel({ filter: { labeel: "a" } }));
    answers.all = await messages.cancel({ all: true });
    await client.batch(Array.from({ length: 150 }, () => ({ url: later, delay: "1h" })));
    answers.deleteAll = await messages.deleteAll();
  },

  async logs() {
    const { messageId } = await client.publish({ url: `${base}/ok`, body: "x", ...everything });
    await ended(messageId, "DELIVERED");
    answers.logs = await client.logs({ filter: { messageId } });
    answers.events = await client.events({ filter: { messageId } });
    const busy = await dead({ retries: 1, retryDelay: "1" });
    answers.busy = await client.logs({ messageIds: [busy] });
    const cancelled = await client.publish({ url: later, delay: "1h", label: ["l", "m"] });
    await messages.cancel(cancelled.messageId);
    const states = async (request) =>
      (await client.logs(request)).logs.map((entry) => entry.state);
    answers.canceled = await states({ filter: { state: "CANCELED" } });
    answers.labelled = await states({ filter: { label: ["m"], toDate: new Date() } });
    answers.inProgress = await states({ filter: { state: "IN_PROGRESS", messageId: busy } });
    answers.nothing = await states({ filter: { urlGroup: "g", scheduleId: "s", queueName: "q" } });
    const pages = [];
    let cursor;
    do {
      const page = await client.logs({ cursor, count: 4, filter: { host: "127.0.0.1" } });
      pages.push(page.logs.length);
      cursor = page.cursor;
    } while (cursor);
    answers.pages = pages.slice(0, -1);
    // As the SDK's documentation begins.
    const now = await client.logs({ cursor: Date.now() + 1000 });
    answers.fromNow = now.logs.length === (await client.logs()).logs.length;
    answers.fromLongAgo = (await client.logs({ cursor: 1 })).logs;
  },

  async dlq() {
    const told = await dead({ ...everything, retries: 0, flowControl: flow });
    const { messages: letters } = await dlq.listMessages({ filter: { messageId: told } });
    answers.letter = letters[0];
    const ids = [];
    for (const options of [{ label: "a" }, { label: "b" }, {}, {}, {}, { queue: "q" }, {}]) {
      const messageId = await dead(options);
      const page = await dlq.listMessages({ filter: { messageId } });
      ids.push(page.messages[0].dlqId);
    }
    const count = async (request) => (await dlq.listMessages(request)).messages.length;
    answers.listed = {
      byIds: await count({ dlqIds: [ids[0], ids[1]] }),
      byLabels: await count({ filter: { label: ["a", "b"] } }),
      byStatus: await count({ filter: { responseStatus: 503 } }),
      byOtherStatus: await count({ filter: { responseStatus: [404, 500] } }),
      byQueue: await count({ filter: { queueName: "q", url: `${base}/busy` } }),
      byFlow: await count({ filter: { flowControlKey: "k" } }),
      byDate: await count({ filter: { fromDate: new Date(), callerIp: "127.0.0.1" } }),
      byGroup: await count({ filter: { urlGroup: "g" } }),
    };
    const page = await dlq.listMessages({ count: 6 });
    const rest = await dlq.listMessages({ cursor: page.cursor });
    answers.pages = [page.messages.length, rest.messages.length, rest.cursor ?? null];
    answers.retriedOne = await dlq.retry(ids[0]);
    await ended(answers.retriedOne.responses[0].messageId, "FAILED");
    answers.retriedMany = await dlq.retry([ids[1], ids[2]]);
    answers.retriedUnknown = await dlq.retry("1-999");
    answers.retriedNone = await dlq.retry([]);
    answers.retriedFilter = await dlq.retry({ filter: { label: "none" } });
    for (const { messageId } of answers.retriedMany.responses) await ended(messageId, "FAILED");
    answers.deletedOne = await dlq.delete(ids[3]);
    answers.deletedAgain = await refusal(() => dlq.delete(ids[3]));
    answers.deletedMany = await dlq.delete([ids[3], ids[4]]);
    answers.deleteMany = await dlq.deleteMany({ dlqIds: [ids[5]] });
    answers.deletedUnknown = await dlq.delete({ dlqIds: "1-999" });
    answers.misspelt = await refusal(() => dlq.delete({ filter: { labeel: "a" } }));
    answers.deletedFilter = await dlq.delete({ filter: { label: "a" } });
    const paged = await dlq.delete({ all: true, count: 1 });
    answers.deletedPage = [paged.deleted, typeof paged.cursor];
    answers.deletedAll = await dlq.delete({ all: true, cursor: paged.cursor });
    answers.retriedAll = await dlq.retry({ all: true });
  },

  async queues() {
    const q = queue("q");
    answers.unknown = await refusal(() => q.get());
    await q.upsert({ parallelism: 2, paused: true });
    answers.get = await q.get();
    answers.enqueue = await q.enqueue({ url: `${base}/ok`, body: "x", ...everything });
    answers.enqueueJSON = await q.enqueueJSON({ url: `${base}/ok`, body: { n: 1 } });
    answers.told = await messages.get(answers.enqueueJSON.messageId);
    answers.list = await q.list();
    await q.resume();
    await ended(answers.enqueueJSON.messageId, "DELIVERED");
    answers.resumed = await q.get();
    await q.pause();
    answers.paused = (await q.get()).paused;
    await q.upsert({});
    answers.defaults = await q.get();
    answers.delayed = await refusal(() => q.enqueue({ url: later, delay: 10 }));
    await q.delete();
    await q.delete();
    answers.empty = await q.list();
  },

  async flowControl() {
    const bring = () => client.publish({ url: later, delay: "1h", flowControl: flow });
    answers.unknown = await refusal(() => flowControl.get("k"));
    await bring();
    answers.get = await flowControl.get("k");
    answers.global = await flowControl.getGlobalParallelism();
    await flowControl.pause("k");
    const { messageId } = await client.publish({ url: `${base}/ok`, flowControl: flow });
    answers.paused = await flowControl.get("k");
    await flowControl.resume("k");
    await ended(messageId, "DELIVERED");
    answers.resumed = await flowControl.get("k");
    await flowControl.resetRate("k");
    answers.reset = await flowControl.get("k");
    await flowControl.pin("k", { parallelism: 7, rate: 8, period: 9 });
    await bring();
    answers.pinned = await flowControl.get("k");
    await flowControl.unpin("k", { parallelism: true, rate: true });
    await bring();
    answers.unpinned = await flowControl.get("k");
    const lone = { key: "lone", period: "60s" };
    answers.lone = await refusal(() => client.publish({ url: later, flowControl: lone }));
  },

  async urlGroups() {
    const endpoints = [{ name: "first", url: `${base}/one` }, { url: `${base}/two` }];
    await urlGroups.addEndpoints({ name: "g", endpoints });
    answers.get = await urlGroups.get("g");
    answers.list = await urlGroups.list();
    answers.publish = await client.publishJSON({ urlGroup: "g", body: { n: 1 } });
    answers.topic = await client.publish({ topic: "g", body: "x" });
    answers.batch = await client.batch([{ url: later, delay: 60 }, { urlGroup: "g" }]);
    answers.enqueue = await queue("q").enqueue({ urlGroup: "g", body: "x" });
    answers.told = await messages.get(answers.publish[0].messageId);
    for (const { messageId } of answers.publish) await ended(messageId, "DELIVERED");
    const { logs } = await client.logs({ filter: { urlGroup: "g" } });
    answers.groups = [...new Set(logs.map((entry) => entry.urlGroup))];
    await urlGroups.removeEndpoints({ name: "g", endpoints: [{ name: "first" }] });
    answers.removed = (await urlGroups.get("g")).endpoints;
    await urlGroups.removeEndpoints({ name: "g", endpoints: [{ url: `${base}/two` }] });
    answers.vanished = await refusal(() => urlGroups.get("g"));
    await urlGroups.addEndpoints({ name: "g", endpoints });
    await urlGroups.delete("g");
    await urlGroups.delete("g");
    answers.empty = await urlGroups.list();
    answers.unknown = await refusal(() => client.publish({ urlGroup: "g" }));
  },

  async schedules() {
    const mine = { destination: later, cron: yearly, scheduleId: "mine" };
    answers.create = await schedules.create({
      ...mine,
      ...everything,
      body: "x",
      delay: 60,
      flowControl: flow,
    });
    answers.get = await schedules.get("mine");
    await schedules.pause({ schedule: "mine" });
    answers.paused = (await schedules.list()).map((each) => each.isPaused);
    await schedules.resume({ schedule: "mine" });
    answers.resumed = (await schedules.get("mine")).isPaused;
    answers.again = await schedules.create({ ...mine, cron: "CRON_TZ=Asia/Tokyo 0 0 1 1 *" });
    answers.replaced = await schedules.list();
    await schedules.delete("mine");
    answers.empty = await schedules.list();
    answers.gone = await refusal(() => schedules.get("mine"));
    answers.own = await schedules.create({ destination: later, cron: yearly, queueName: "q" });
    answers.badCron = await refusal(() => schedules.create({ ...mine, cron: "often" }));
  },

  async errors() {
    const refused = (options) => refusal(() => client.publish(options));
    answers.stranger = await refusal(() => new Client({ token: "x", retry: false }).logs());
    answers.scheme = await refused({ url: "https%3A%2F%2Fa.test" });
    answers.delay = await refused({ url: later, delay: "1" });
    answers.retries = await refused({ url: later, retries: 6 });
    answers.colon = await refused({ url: later, deduplicationId: "a:b" });
    answers.callback = await refused({ url: later, callback: "a.test" });
    answers.message = await refusal(() => messages.get("msg_unknown"));
    answers.workflow = await refusal(() => workflow.cancel("wfr_1"));
    const messagesOfChat = [{ role: "user", content: "hi" }];
    const asked = { model: "m", provider: upstash(), messages: messagesOfChat };
    answers.chat = await refusal(() => chat.create(asked));
  },
};

await sections[process.argv[2]]();
const closed = new Promise((resolve) => destination.close(resolve));
destination.closeAllConnections();
await closed;
const lists = { called: [...called], offered: [...offered] };
process.stdout.write(JSON.stringify({ base, answers, received, ...lists }));

// A conversation on a page: shows each piece of an answer as it comes, and looks for what was asked
// in the background. Without it the form works by itself. No dependencies, nothing inline.
"use strict";

const FIRST_LOOK = 1000; // milliseconds
const LAST_LOOK = 15000;

class Conversation {
  constructor(box) {
    this.url = box.dataset.url;
    this.log = box.querySelector(".llm-log");
    this.form = box.querySelector(".llm-form");
    this.text = this.form.elements.said;
    this.stop = box.querySelector(".llm-stop");
    this.status = box.querySelector(".llm-status");
    this.turn = box.querySelector("template");
    this.broken = box.querySelector("template.llm-broken").content.textContent;
    this.leaving = null;
    this.pause = FIRST_LOOK;
    this.form.addEventListener("submit", (event) => this.submit(event));
    this.stop.addEventListener("click", () => this.leaving?.abort());
    this.text.addEventListener("keydown", (event) => this.key(event));
    document.addEventListener("visibilitychange", () => this.lookLater());
    this.toEnd();
    this.lookLater();
  }

  key(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    this.form.requestSubmit(this.form.querySelector(".llm-send"));
  }

  async submit(event) {
    event.preventDefault();
    if (this.leaving) return;
    const fields = new FormData(this.form, event.submitter);
    const turn = this.turn.content.cloneNode(true).firstElementChild;
    const [said, answer] = turn.querySelectorAll(".llm-words");
    const note = turn.querySelector(".llm-note");
    const again = fields.get("said");
    said.textContent = again.trim();
    this.log.querySelector(".llm-turns").append(turn);
    this.text.value = "";
    this.status.textContent = "";
    this.work(true);
    this.toEnd();
    try {
      for await (const [name, told] of this.ask(fields)) {
        if (name === "chunk") {
          note.remove();
          this.atEnd(() => answer.append(told));
        } else if (name === "failed") {
          this.fail(told, again);
        }
      }
    } catch (error) {
      if (error.name !== "AbortError") this.fail(this.broken, again);
    }
    this.work(false);
    this.pause = FIRST_LOOK;
    await this.look();
  }

  fail(sentence, said) {
    this.status.textContent = sentence;
    this.text.value ||= said; // not to be typed again
  }

  work(is) {
    this.leaving = is ? new AbortController() : null;
    const { activeElement } = document;
    const isOnButton = this.form.contains(activeElement) && activeElement !== this.text;
    if (is) this.stop.hidden = false;
    this.log.setAttribute("aria-busy", is); // read out when it is whole, not word by word
    for (const button of this.form.querySelectorAll("[name=way]")) button.hidden = is;
    if (isOnButton) (is ? this.stop : this.text).focus();
    if (!is) this.stop.hidden = true;
  }

  async *ask(fields) {
    const response = await fetch(this.url, {
      method: "POST",
      body: new URLSearchParams(fields),
      headers: { Accept: "text/event-stream" },
      credentials: "same-origin",
      signal: this.leaving.signal,
    });
    const kind = response.headers.get("Content-Type") ?? "";
    if (!response.ok || !kind.startsWith("text/event-stream")) throw new Error(response.status);
    let rest = "", isOver = false;
    const decoder = new TextDecoder();
    const reader = response.body.getReader();
    while (true) {
      const { value, done } = await reader.read();
      if (done) break;
      const events = (rest + decoder.decode(value, { stream: true })).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const lines = event.split("\n");
        const name = lines.find((line) => line.startsWith("event: "))?.slice(7);
        const data = lines.find((line) => line.startsWith("data: "))?.slice(6);
        if (!name) continue; // a heartbeat
        isOver ||= name !== "chunk";
        yield [name, JSON.parse(data)];
      }
    }
    if (!isOver) throw new Error("cut");
  }

  // What the server says of all turns, which is the truth once an answer is over.
  async look() {
    let response;
    try {
      const headers = this.etag ? { "If-None-Match": this.etag } : {};
      response = await fetch(this.url, { headers, cache: "no-store", credentials: "same-origin" });
    } catch {
      return this.lookLater();
    }
    if (this.leaving) return;
    if (response.status === 200 && response.headers.has("ETag") && !response.redirected) {
      this.etag = response.headers.get("ETag");
      const turns = await response.text();
      this.atEnd(() => (this.log.innerHTML = turns)); // of our own server, escaped there
    }
    this.lookLater();
  }

  lookLater() {
    clearTimeout(this.timer);
    if (document.hidden || this.leaving || !this.log.querySelector("[data-underway]")) return;
    this.timer = setTimeout(() => this.look(), this.pause);
    this.pause = Math.min(this.pause * 1.5, LAST_LOOK);
  }

  // Who has scrolled up to read is left there.
  atEnd(change) {
    const isAtEnd = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 60;
    change();
    if (isAtEnd) this.toEnd();
  }

  toEnd() {
    this.log.scrollTop = this.log.scrollHeight;
  }
}

for (const box of document.querySelectorAll(".llm-conversation")) new Conversation(box);

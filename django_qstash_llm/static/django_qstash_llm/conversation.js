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
    this.scroll();
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
    said.textContent = fields.get("said").trim();
    this.log.querySelector(".llm-turns").append(turn);
    this.scroll();
    this.work(true);
    this.status.textContent = "";
    try {
      for await (const [name, told] of this.ask(fields)) {
        if (name === "chunk") {
          if (!answer.firstChild) note.remove();
          answer.append(told);
          this.scroll();
        } else if (name === "failed") {
          this.status.textContent = told;
        } else {
          this.text.value = "";
        }
      }
    } catch (error) {
      if (error.name === "AbortError") this.text.value = "";
      else this.status.textContent = this.broken;
    }
    this.work(false);
    this.pause = FIRST_LOOK;
    await this.look();
    this.text.focus();
  }

  work(is) {
    this.leaving = is ? new AbortController() : null;
    this.stop.hidden = !is;
    this.log.setAttribute("aria-busy", is); // read out when it is whole, not word by word
    for (const button of this.form.querySelectorAll("[name=way]")) button.disabled = is;
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
      const isAtEnd = this.isAtEnd();
      this.log.innerHTML = await response.text(); // of our own server, escaped there
      if (isAtEnd) this.scroll(true);
    }
    this.lookLater();
  }

  lookLater() {
    clearTimeout(this.timer);
    if (document.hidden || this.leaving || !this.log.querySelector("[data-underway]")) return;
    this.timer = setTimeout(() => this.look(), this.pause);
    this.pause = Math.min(this.pause * 1.5, LAST_LOOK);
  }

  isAtEnd() {
    return this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 60;
  }

  scroll(always = !this.wasRead) {
    if (always || this.isAtEnd()) this.log.scrollTop = this.log.scrollHeight;
    this.wasRead = true;
  }
}

for (const box of document.querySelectorAll(".llm-conversation")) new Conversation(box);

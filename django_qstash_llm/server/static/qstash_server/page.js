"use strict";

// Keeps the page up to date: asks for what changes every other second, less and less often while
// nobody answers, and not at all while nobody looks.

const EVERY = 2000;
const SELDOM = 30000;
const PATIENCE = 10000;

const liveness = document.getElementById("liveness");
const shown = document.getElementById("fragment");
let etag = "";
let failures = 0;
let timer = 0;
let isAsking = false;

function say(kind, seconds) {
    const text = liveness.dataset[kind].replace("{}", seconds);
    liveness.className = kind;
    // Unchanged text is not read out again.
    if (liveness.textContent !== text) liveness.textContent = text;
}

function replace(html) {
    const fresh = new DOMParser().parseFromString(html, "text/html");
    for (const part of fresh.body.children) {
        const old = document.getElementById(part.id);
        // What did not change stays: somebody may be selecting in it, or scrolling.
        if (old && old.innerHTML === part.innerHTML) continue;
        if (!old) {
            shown.append(document.adoptNode(part.cloneNode(true)));
            continue;
        }
        const focused = old.contains(document.activeElement);
        const left = old.querySelector(".wide")?.scrollLeft ?? 0;
        old.innerHTML = part.innerHTML;
        const wide = old.querySelector(".wide");
        if (wide) wide.scrollLeft = left;
        if (wide && focused) wide.focus({ preventScroll: true });
    }
}

async function ask() {
    const headers = etag ? { "If-None-Match": etag } : {};
    const response = await fetch("/page/fragment", {
        headers,
        cache: "no-store",
        signal: AbortSignal.timeout(PATIENCE),
    });
    if (response.status === 304) return;
    if (!response.ok) throw new Error(`status ${response.status}`);
    const html = await response.text();
    etag = response.headers.get("ETag") ?? "";
    replace(html);
}

async function round() {
    if (isAsking || document.hidden) return;
    isAsking = true;
    let wait = EVERY;
    try {
        await ask();
        failures = 0;
        say("live");
    } catch {
        failures += 1;
        wait = Math.min(SELDOM, EVERY * 2 ** failures);
        say("lost", Math.round(wait / 1000));
    } finally {
        isAsking = false;
    }
    clearTimeout(timer);
    if (document.hidden) say("hidden");
    else timer = setTimeout(round, wait);
}

document.addEventListener("visibilitychange", () => {
    clearTimeout(timer);
    if (document.hidden) say("hidden");
    else round();
});

round();

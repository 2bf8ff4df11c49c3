// Keys, drafts and a submit that keeps trying. The page works without any of it.
"use strict";
const form = document.getElementById("task");
const state = document.getElementById("state");
const help = document.getElementById("help");
const submitButton = document.getElementById("submit");
const replies = [...document.querySelectorAll(".reply")];
const field = (name) => form.elements[name];
const draftName = `draft-${field("assignment").value}-${field("revision").value}`;
const DRAFTED = /^(rank-\d|preference|best|worst|flag|reason)$/;
let visibleMs = 0;
let visibleSince = document.visibilityState === "visible" ? performance.now() : null;
let isSending = false;
document.documentElement.classList.add("js");

// Private windows may have no storage; then there are no drafts.
const storage = (() => { try { return window.localStorage; } catch { return null; } })();
const stored = (name) => { try { return storage?.getItem(name) ?? null; } catch { return null; } };
const store = (name, value) => { try { storage?.setItem(name, value); } catch { /* full, or refused */ } };

function say(text, kind = "") {
  const span = document.createElement("span");
  span.className = kind;
  span.textContent = text;
  state.replaceChildren(span);
}

function countVisible() {
  if (visibleSince !== null) visibleMs += performance.now() - visibleSince;
  visibleSince = document.visibilityState === "visible" ? performance.now() : null;
}

function saveDraft() {
  countVisible();
  const chosen = [...new FormData(form)].filter(([name]) => DRAFTED.test(name));
  store(draftName, JSON.stringify({ chosen, visibleMs }));
}

function restoreDraft() {
  const text = stored(draftName);
  if (!text) return;
  const draft = JSON.parse(text);
  visibleMs = draft.visibleMs;
  for (const input of form.querySelectorAll("input[type=radio], input[type=checkbox]")) {
    input.checked = draft.chosen.some(([name, value]) => name === input.name && value === input.value);
  }
  const reason = draft.chosen.find(([name]) => name === "reason");
  if (reason) field("reason").value = reason[1];
  if (draft.chosen.some(([name, value]) => name === "flag" || (name === "reason" && value))) {
    document.getElementById("marks").open = true;
  }
}

// The order as it stands: "B, then A = C".
function sayOrder() {
  if (form.dataset.kind !== "rank" || isSending) return;
  const byRank = new Map();
  replies.forEach((_, place) => {
    const rank = field(`rank-${place}`).value;
    if (rank) byRank.set(rank, [...(byRank.get(rank) ?? []), "ABCDEFGHI"[place]]);
  });
  const order = [...byRank.keys()].sort().map((rank) => byRank.get(rank).join(" = "));
  if (order.length) say(order.join(", then "));
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

// What is being sent cannot be changed; the line that says so stays readable.
function freeze(frozen) {
  isSending = submitButton.disabled = frozen;
  for (const part of form.querySelectorAll(".replies, .scale, #marks")) part.inert = frozen;
}

async function send() {
  if (isSending) return;
  countVisible();
  field("ms_visible").value = Math.round(visibleMs);
  const body = new URLSearchParams(new FormData(form));
  freeze(true);
  say("Saving…");
  for (let attempt = 0; ; attempt++) {
    const answer = await tryOnce(body);
    if (answer === null || answer.status >= 500 || answer.status === 429) {
      say("Not saved yet, retrying. You may leave this page open.", "problem");
      await pause(Math.min(10000, 500 * 2 ** attempt) * (0.75 + Math.random() / 2));
      continue;
    }
    if (answer.saved !== undefined) {
      try { storage?.removeItem(draftName); } catch { /* no storage */ }
      location.assign(answer.next);
      return;
    }
    freeze(false);
    explain(answer);
    return;
  }
}

async function tryOnce(body) {
  try {
    const signal = AbortSignal.timeout(15000);
    const response = await fetch("/answer", { method: "POST", body, headers: { Accept: "application/json" }, signal });
    return { ...(await response.json()), status: response.status };
  } catch {
    return null;
  }
}

function explain(answer) {
  say(answer.problem ?? "This was not saved.", "problem");
  if (answer.link && answer.link !== "/") {
    const link = document.createElement("a");
    link.href = answer.link;
    link.textContent = "See your answer";
    state.append(" ", link);
  }
  const missing = replies.find((_, place) => form.dataset.kind === "rank" && !field(`rank-${place}`).value);
  missing?.focus();
}

function current() {
  const place = replies.indexOf(document.activeElement?.closest(".reply"));
  return place;
}

function focusReply(place) {
  replies[Math.max(0, Math.min(replies.length - 1, place))].focus();
}

function choose(name, value) {
  const input = form.querySelector(`input[name="${name}"][value="${value}"]`);
  if (!input) return false;
  input.checked = true;
  input.dispatchEvent(new Event("change", { bubbles: true }));
  return true;
}

function rank(value) {
  const place = Math.max(0, current());
  if (!choose(`rank-${place}`, value)) return;
  const next = replies.findIndex((_, other) => !field(`rank-${other}`).value);
  if (next >= 0) focusReply(next);
  else submitButton.focus();
}

function openMarks() {
  document.getElementById("marks").open = true;
  form.querySelector("input[name=flag]").focus();
}

const KEYS = {
  j: () => focusReply(current() + 1),
  k: () => focusReply(current() < 0 ? 0 : current() - 1),
  b: () => form.dataset.kind === "best-worst" && choose("best", Math.max(0, current())),
  w: () => form.dataset.kind === "best-worst" && choose("worst", Math.max(0, current())),
  u: () => document.getElementById("undo").click(),
  s: openMarks,
  g: () => location.assign("/guidelines"),
  "?": () => help.showModal(),
};

function onKey(event) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    send();
    return;
  }
  const isTyping = event.target.matches("textarea, input:not([type=radio], [type=checkbox])");
  if (isTyping || isSending || help.open || event.ctrlKey || event.metaKey || event.altKey) return;
  if (!document.getElementById("keys").checked) return;
  if (/^[1-9]$/.test(event.key)) {
    if (form.dataset.kind === "pair") choose("preference", Number(event.key) - 4);
    else if (form.dataset.kind === "rank") rank(event.key);
  } else if (KEYS[event.key.toLowerCase()]) {
    event.preventDefault();
    KEYS[event.key.toLowerCase()]();
  }
}

async function renew() {
  const body = new URLSearchParams(new FormData(form));
  try {
    await fetch("/renew", { method: "POST", body, headers: { Accept: "application/json" } });
  } catch { /* the submit will say so */ }
}

document.getElementById("keys").checked = stored("keys") !== "off";
document.getElementById("keys").addEventListener("change", (event) => store("keys", event.target.checked ? "on" : "off"));
document.getElementById("show-help").addEventListener("click", () => help.showModal());
document.addEventListener("keydown", onKey);
document.addEventListener("visibilitychange", saveDraft);
addEventListener("pagehide", () => { if (!isSending) saveDraft(); });
form.addEventListener("change", () => { saveDraft(); sayOrder(); });
form.addEventListener("input", saveDraft);
form.addEventListener("submit", (event) => {
  if (event.submitter?.id === "skip") return;
  event.preventDefault();
  send();
});
if (field("revision").value === "0") setInterval(renew, Number(form.dataset.renewS) * 1000);
restoreDraft();

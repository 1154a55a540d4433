// The view of blind votes: a pair, a choice, the names after it.
import { get, post, Outbox, randomName } from "./net.js";
import { currentLanguage, t } from "./words.js";
import { $, showText, toast, banner, person, tab } from "./parts.js";

const WORDS = { left: "chose_left", right: "chose_right", tie: "chose_tie", bad: "chose_bad", skip: "chose_skip" };
const KEYS = { 1: "left", 2: "right", 3: "tie", 0: "bad", s: "skip" };
const POLL_MS = 1000;
// Pairs that lie ready: a prompt that is put on the list comes after them.
const AHEAD = 2;

let current = null;
let ready = [];
let shownAt = 0;
let progress = null;
let asking = false;
let askAgain = false;
let timer = 0;
// Votes of this page, the last one at the end, for the line above the prompt and for undo.
let votes = [];
let canVote = true;

const outbox = new Outbox(tab(), {
  stored(vote, answer) {
    const known = votes.find((one) => one.key === vote.key);
    if (known) Object.assign(known, { answer });
    // The server counts it from now on; what it says next overrules this.
    if (progress) progress.done += 1;
    showReceipt();
    load();
  },
  refused(vote, error) {
    votes = votes.filter((one) => one.key !== vote.key);
    showReceipt();
    toast(t("refused", { why: error.message }));
  },
  trouble(error, count) {
    const key = error.code === "disk_full" ? "disk_full" : "offline";
    banner(() => t(key, { count }));
    showReceipt();
  },
  calm: () => banner(null),
});

export function start(state) {
  canVote = state.can_vote;
  for (const button of document.querySelectorAll(".choice")) {
    button.addEventListener("click", () => vote(button.dataset.side));
  }
  $("edit").addEventListener("click", openEditor);
  $("save-edit").addEventListener("click", saveEdit);
  $("cancel-edit").addEventListener("click", () => $("editor").close());
  for (const radio of document.getElementsByName("better")) radio.addEventListener("change", () => fillEditor(radio.value));
  $("editor").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) saveEdit();
  });
  $("reason").addEventListener("keydown", (event) => {
    if (event.key === "Escape" || event.key === "Enter") {
      event.preventDefault();
      $("prompt-title").focus();
    }
  });
  outbox.send();
  load();
}

// Another person sees other pairs, and other sides of them.
export function restart() {
  current = null;
  ready = [];
  votes = [];
  load();
}

// ---- what is shown ----
async function load() {
  if (!canVote) return render();
  askAgain = asking;
  if (asking) return;
  asking = true;
  const who = person();
  const held = [...outbox.pairs(), ...ready.map((pair) => pair.pair), ...(current ? [current.pair] : [])];
  try {
    const answer = await get("/page/next", { person: who, tab: tab(), held: held.join(","), count: Math.max(0, AHEAD - ready.length + (current ? 0 : 1)) });
    if (who === person()) {
      const known = new Set([...held, ...outbox.pairs()]);
      ready.push(...answer.pairs.filter((pair) => !known.has(pair.pair)));
      progress = answer.progress;
    }
    if (!outbox.waiting.length) banner(null);
  } catch (error) {
    if (!outbox.waiting.length) banner(() => t(error.code === "disk_full" ? "disk_full" : "offline", { count: 0 }));
    later();
  }
  asking = false;
  if (who !== person() || askAgain) return load();
  if (!current) return next();
  if (progress) showProgress();
  showReceipt();
}

// One timer, however many reasons there are to look again.
function later() {
  clearTimeout(timer);
  timer = setTimeout(load, POLL_MS);
}

function next() {
  current = ready.shift() ?? null;
  shownAt = performance.now();
  render();
  if (!current && canVote && (progress === null || progress.done + outbox.waiting.length < progress.total)) {
    later();
  }
}

// The view is opened; prompts may have come from the chat meanwhile.
export function show() {
  render();
  if (!current) load();
}

function render() {
  $("ballot").hidden = !current;
  $("vote-empty").hidden = Boolean(current) || (canVote && progress === null);
  $("vote-empty").textContent = t(whyEmpty());
  document.querySelector(".progress").hidden = !canVote || !progress;
  if (progress) showProgress();
  showReceipt();
  if (!current) return;

  showTurns($("prompt"), current.turns);
  showText($("left"), current.left);
  showText($("right"), current.right);
}

function whyEmpty() {
  if (!canVote) return "nothing_to_compare";
  if (!isDone()) return "writing";
  return progress.total || !progress.same ? "all_done" : "all_same";
}

function isDone() {
  return progress !== null && progress.done + outbox.waiting.length >= progress.total && !progress.waiting;
}

function showProgress() {
  const done = Math.min(progress.total, progress.done + outbox.waiting.length);
  const bar = $("progress-bar");
  bar.style.width = `${progress.total ? (100 * done) / progress.total : 100}%`;
  bar.setAttribute("aria-valuemax", progress.total);
  bar.setAttribute("aria-valuenow", done);
  const round = progress.rounds > 1 ? ` · ${t("round", { round: progress.round, rounds: progress.rounds })}` : "";
  $("progress-text").textContent = t("progress_text", { done, total: progress.total }) + round;
}

function showTurns(place, turns) {
  place.replaceChildren();
  for (const [role, said] of turns) {
    const turn = document.createElement("div");
    turn.className = `turn ${role}`;
    turn.dir = "auto";
    showText(turn, said);
    place.append(turn);
  }
}

let drawn = "";
function showReceipt() {
  const place = $("receipt");
  const last = votes.at(-1);
  // A screen reader says it again whenever it is drawn again.
  const wanted = JSON.stringify([Boolean(current), last?.key, last?.answer, $("banner").hidden, currentLanguage()]);
  if (wanted === drawn) return;
  drawn = wanted;
  place.replaceChildren();
  if (!last) {
    if (current) place.textContent = t("first_time");
    return;
  }

  const said = document.createElement("span");
  said.textContent = t("you_said", { choice: t(WORDS[last.side]) });
  const more = document.createElement("span");
  more.className = "names";
  if (last.answer) {
    const named = ({ version, score }) => version + (score === null ? "" : ` (${t("score", { score: score.toFixed(2) })})`);
    more.textContent = t("names", { left: named(last.answer.left), right: named(last.answer.right) });
  } else {
    more.textContent = t($("banner").hidden ? "storing" : "kept");
  }
  const button = document.createElement("button");
  button.type = "button";
  button.className = "quiet";
  button.id = "undo";
  button.setAttribute("aria-keyshortcuts", "u");
  const key = document.createElement("kbd");
  key.textContent = "u";
  button.append(key, ` ${t("undo")}`);
  button.addEventListener("click", undo);
  place.append(said, " ", more, button);
}

// ---- votes ----
function vote(side, edited = null) {
  if (!current) return;
  const margin = document.querySelector("input[name=margin]:checked").value;
  const given = {
    key: randomName(), pair: current.pair, person: person(), side, edited,
    margin: margin && (side === "left" || side === "right") ? Number(margin) : null,
    reason: $("reason").value.trim() || null,
    seconds: Math.round(performance.now() - shownAt) / 1000,
  };
  votes.push({ key: given.key, side, pair: current, answer: null });
  document.querySelector("input[name=margin]").checked = true;
  $("reason").value = "";
  outbox.add(given);
  next();
  load();
  // A screen reader reads the new prompt from here on.
  if (current) $("prompt-title").focus({ preventScroll: true });
  window.scrollTo({ top: 0 });
}

async function undo() {
  const last = votes.at(-1);
  if (!last) return toast(t("nothing_to_undo"));
  let pair = last.pair;
  if (!outbox.remove(last.key)) {
    if (!last.answer) return;
    try {
      ({ pair } = await post("/page/undo", { vote: last.answer.vote, person: person(), tab: tab() }));
    } catch (error) {
      return toast(error.message);
    }
  }
  votes.pop();
  if (current) ready.unshift(current);
  current = pair;
  shownAt = performance.now();
  render();
  toast(t("undone"));
  load();
}

// ---- the better answer, edited ----
function openEditor() {
  if (!current) return;
  for (const radio of document.getElementsByName("better")) radio.checked = false;
  $("edited").value = "";
  $("edited").disabled = true;
  $("editor").showModal();
  document.getElementsByName("better")[0].focus();
}

function fillEditor(side) {
  $("edited").disabled = false;
  $("edited").value = current[side];
}

function saveEdit() {
  const side = document.querySelector("input[name=better]:checked")?.value;
  const text = $("edited").value;
  if (!side || !text.trim() || text === current[side]) return toast(t("needs_change"));
  $("editor").close();
  vote(side, text);
}

// ---- keys ----
export function key(event) {
  const editing = $("editor").open;
  if (editing) {
    const place = { 1: 0, 2: 1 }[event.key];
    const isTyping = event.target.id === "edited";
    if (place === undefined || isTyping) return;
    const radio = document.getElementsByName("better")[place];
    radio.checked = true;
    fillEditor(radio.value);
    $("edited").focus();
    event.preventDefault();
    return;
  }
  // The arrow keys of the radio buttons are theirs, every letter and digit is ours.
  const isField = event.target.matches("input:not([type=radio]), textarea, select");
  if (isField) return;

  const name = event.key.toLowerCase();
  if (name in KEYS) vote(KEYS[name]);
  else if (name === "u") undo();
  else if (name === "e") openEditor();
  else if (name === "r") $("reason").focus();
  else if (name === "m") nextMargin();
  else return;
  event.preventDefault();
}

function nextMargin() {
  const radios = [...document.getElementsByName("margin")];
  const place = radios.findIndex((radio) => radio.checked);
  radios[(place + 1) % radios.length].checked = true;
}

// The view of conversations: one to three versions answer the same messages, each in a column of its own.
import { post, stream } from "./net.js";
import { $, copy, make, showText, toast } from "./parts.js";
import { t } from "./words.js";

const MIX = "\u0000mix";
const MOST = 3;
let state = null;
let columns = [];
let running = 0;

export function start(found) {
  state = found;
  if (!found.chat) return;
  const { temperature, top_p, max_new_tokens, do_sample } = found.settings;
  $("temperature").value = do_sample ? temperature : 0;
  $("top_p").value = top_p;
  $("max_new_tokens").value = max_new_tokens;
  $("add-column").addEventListener("click", () => addColumn());
  $("new-chat").addEventListener("click", newChat);
  $("stop").addEventListener("click", stop);
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("message").addEventListener("keydown", (event) => {
    // While a Chinese input method composes, Enter chooses a word.
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  });
  $("message").addEventListener("input", grow);
  for (const name of found.versions.slice(-2).reverse()) addColumn(name);
}

export function show() {
  const any = Boolean(state?.chat);
  $("chat-empty").hidden = any;
  $("talk").hidden = !any;
  for (const column of columns) column.draw();
}

function grow() {
  const area = $("message");
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight, 240)}px`;
}

// ---- columns ----
class Column {
  constructor(name) {
    this.version = name;
    // From the first version of a mix to its second.
    const before = state.versions[Math.max(0, state.versions.indexOf(name) - 1)];
    this.mix = { from: before, to: name, share: 100 };
    // {role, text, info} of each turn; the last answer may still be growing.
    this.turns = [];
    this.abort = null;
    this.element = make("article", "column");
    this.draw();
  }

  asked() {
    if (this.version !== MIX) return this.version;
    const { from, to, share } = this.mix;
    // Two shares of one version are one.
    return from === to ? to : { [from]: Math.round(100 - share) / 100, [to]: share / 100 };
  }

  draw() {
    const head = make("header");
    const choice = select([...state.versions, ...(state.versions.length > 1 ? [MIX] : [])], this.version, t("version"));
    choice.addEventListener("change", () => {
      this.version = choice.value;
      this.draw();
    });
    head.append(choice);
    if (columns.length > 1) {
      const remove = make("button", "quiet", "×");
      remove.type = "button";
      remove.setAttribute("aria-label", t("remove"));
      remove.addEventListener("click", () => removeColumn(this));
      head.append(remove);
    }
    this.log = make("div", "log");
    this.log.setAttribute("aria-live", "off");
    this.element.replaceChildren(head, ...(this.version === MIX ? [this.slider()] : []), this.log);
    this.drawTurns();
    $("add-column").hidden = columns.length >= MOST || columns.length >= state.versions.length + 1;
  }

  slider() {
    const place = make("div", "mix");
    const from = select(state.versions, this.mix.from, t("mix_of"));
    const to = select(state.versions, this.mix.to, t("mix_to"));
    const range = make("input");
    range.type = "range";
    range.min = 0;
    range.max = 120;
    range.step = 5;
    range.value = this.mix.share;
    const said = make("output");
    const tell = () => {
      const words = t("mix_share", { to: this.mix.to });
      range.setAttribute("aria-label", words);
      said.textContent = `${words}: ${this.mix.share} %`;
    };
    from.addEventListener("change", () => (this.mix.from = from.value));
    to.addEventListener("change", () => {
      this.mix.to = to.value;
      tell();
    });
    range.addEventListener("input", () => {
      this.mix.share = Number(range.value);
      tell();
    });
    tell();
    const names = make("div", "names");
    names.append(from, make("span", "soft", "→"), to);
    place.append(names, range, said);
    return place;
  }

  drawTurns() {
    this.log.replaceChildren(...this.turns.map((turn, place) => this.turn(turn, place === this.turns.length - 1)));
  }

  turn({ role, text, info }, isLast) {
    const place = make("div", `turn ${role}`);
    const said = make("div", "text");
    said.dir = "auto";
    if (role === "assistant" && !info && !text) said.append(make("span", "soft", t("answering")));
    else if (text || !info?.error) showText(said, text);
    place.append(said);
    if (role === "assistant" && info) place.append(this.note(text, info, isLast));
    return place;
  }

  note(text, info, isLast) {
    const place = make("div", "note");
    const words = [];
    if (info.error) words.push(info.error);
    if (info.tokens !== undefined) words.push(t("tokens", { count: info.tokens }));
    if (info.finish === "length") words.push(t("cut"));
    if (info.finish === "cancelled") words.push(t("stopped"));
    if (typeof info.score === "number") words.push(t("score", { score: info.score.toFixed(2) }));
    place.append(make("span", info.error ? "warning" : "soft", words.join(" · ")));
    const buttons = [["copy", () => copy(text)]];
    if (isLast) buttons.push(["regenerate", () => this.again()]);
    if (isLast && state.can_vote) buttons.push(["to_vote", () => this.toVote()]);
    for (const [name, act] of buttons) {
      const button = make("button", "quiet small", t(name));
      button.type = "button";
      button.addEventListener("click", act);
      place.append(button);
    }
    return place;
  }

  // ---- answers ----
  async ask(seed) {
    const answer = { role: "assistant", text: "", info: null };
    const settings = readSettings();
    const turns = this.turns.map(({ role, text }) => [role, text]);
    this.turns.push(answer);
    this.drawTurns();
    this.abort = new AbortController();
    begun();
    try {
      const body = { version: this.asked(), turns, seed, ...settings };
      for await (const line of stream("/page/chat", body, this.abort.signal)) {
        if (line.text !== undefined) answer.text += line.text;
        else {
          answer.info = line;
          if (line.whole !== undefined) answer.text = line.whole;
        }
        this.grown(answer);
      }
      answer.info ??= { error: t("offline", { count: 0 }) };
    } catch (error) {
      answer.info = error.name === "AbortError" ? { finish: "cancelled" } : { error: error.message };
    }
    this.abort = null;
    ended();
    this.drawTurns();
  }

  grown(answer) {
    const isAtEnd = window.innerHeight + window.scrollY >= document.body.scrollHeight - 80;
    showText(this.log.lastElementChild.querySelector(".text"), answer.text);
    if (isAtEnd) window.scrollTo({ top: document.body.scrollHeight });
  }

  again() {
    if (running || !readSettings()) return;
    this.turns.pop();
    this.ask(newSeed());
  }

  async toVote() {
    const asked = this.turns.slice(0, -1).map(({ role, text }) => [role, text]);
    try {
      await post("/page/prompt", { turns: asked });
      toast(t("on_the_list"));
    } catch (error) {
      toast(error.message);
    }
  }
}

function select(names, chosen, label) {
  const made = make("select");
  made.setAttribute("aria-label", label);
  for (const name of names) made.append(new Option(name === MIX ? t("mix") : name, name));
  made.value = chosen;
  return made;
}

function addColumn(name) {
  const free = state.versions.find((one) => !columns.some((column) => column.version === one));
  const column = new Column(name ?? free ?? state.versions.at(-1));
  // A new column begins with the conversation's messages still to be answered: it starts empty.
  columns.push(column);
  redraw();
}

function removeColumn(column) {
  column.abort?.abort();
  columns = columns.filter((other) => other !== column);
  redraw();
}

function redraw() {
  $("columns").replaceChildren(...columns.map((column) => column.element));
  $("columns").dataset.count = columns.length;
  for (const column of columns) column.draw();
}

function newChat() {
  stop();
  for (const column of columns) column.turns = [];
  redraw();
  $("message").focus();
}

// ---- sending ----
const newSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

function readSettings() {
  const found = {
    temperature: $("temperature").valueAsNumber, top_p: $("top_p").valueAsNumber,
    max_new_tokens: $("max_new_tokens").valueAsNumber,
  };
  const fine = ["temperature", "top_p", "max_new_tokens"].every((name) => $(name).checkValidity() && found[name] >= 0);
  if (fine) return found;
  toast(t("bad_numbers"));
  return null;
}

function send() {
  const text = $("message").value.trim();
  if (!text || running || !readSettings()) return;
  $("message").value = "";
  grow();
  // One seed for all columns: two answers differ by their weights and never by luck.
  const seed = newSeed();
  for (const column of columns) {
    column.turns.push({ role: "user", text });
    column.ask(seed);
  }
  $("composer").scrollIntoView({ block: "nearest" });
}

function stop() {
  for (const column of columns) column.abort?.abort();
}

function begun() {
  running += 1;
  $("send").hidden = true;
  $("stop").hidden = false;
}

function ended() {
  running -= 1;
  $("send").hidden = running > 0;
  $("stop").hidden = running === 0;
}

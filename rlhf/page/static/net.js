// Requests to the server, and the votes that wait in this browser until they are on its disk.

export class Failed extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

async function failure(response) {
  const body = await response.json().catch(() => ({}));
  const error = body.error ?? {};
  return new Failed(response.status, error.code ?? "", error.message ?? response.statusText);
}

export async function get(address, values = {}) {
  const query = new URLSearchParams(values).toString();
  const response = await fetch(query ? `${address}?${query}` : address);
  if (!response.ok) throw await failure(response);
  return response.json();
}

const written = (body, signal) => ({
  method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal,
});

export async function post(address, body) {
  const response = await fetch(address, written(body));
  if (!response.ok) throw await failure(response);
  return response.json();
}

// Lines of JSON as they come.
export async function* stream(address, body, signal) {
  const response = await fetch(address, written(body, signal));
  if (!response.ok) throw await failure(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}

// A name of 16 random hexadecimal digits; crypto.randomUUID needs https, which a local page has not everywhere.
export function randomName() {
  const bytes = crypto.getRandomValues(new Uint8Array(8));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// Numbers, and texts that survive a reload. A browser may forbid storage: then they last as long as the page.
const memory = new Map();
export const kept = {
  read(name) {
    try {
      return localStorage.getItem(name) ?? memory.get(name) ?? null;
    } catch {
      return memory.get(name) ?? null;
    }
  },
  write(name, text) {
    memory.set(name, text);
    try {
      localStorage.setItem(name, text);
    } catch {
      // Storage is forbidden or full: the memory has it.
    }
  },
};

const RETRY_MS = 2000;
// A vote that the server will never take: it has answered, and will answer the same again.
const FINAL = [400, 404, 409, 413];

// Each tab keeps a list of its own under its own name, so that no tab overwrites another's votes.
const PREFIX = "waiting-";

export class Outbox {
  // stored(vote, answer), refused(vote, error), trouble(error, count) and calm() tell what becomes of votes.
  constructor(tab, listener) {
    this.name = PREFIX + tab;
    this.listener = listener;
    this.waiting = [...left(), ...JSON.parse(kept.read(this.name) ?? "[]")];
    this.sending = false;
    this.save();
  }

  add(vote) {
    this.waiting.push(vote);
    this.save();
    this.send();
  }

  // Take a vote back that has not been stored; false where it has.
  remove(key) {
    const count = this.waiting.length;
    this.waiting = this.waiting.filter((vote) => vote.key !== key || vote.sent);
    this.save();
    return this.waiting.length < count;
  }

  pairs() {
    return this.waiting.map((vote) => vote.pair);
  }

  save() {
    kept.write(this.name, JSON.stringify(this.waiting.map(({ sent, ...vote }) => vote)));
  }

  async send() {
    if (this.sending) return;
    this.sending = true;
    while (this.waiting.length) {
      const vote = this.waiting[0];
      vote.sent = true;
      const { sent, ...body } = vote;
      try {
        const answer = await post("/page/vote", body);
        this.drop(vote);
        this.listener.stored(vote, answer);
        this.listener.calm();
      } catch (error) {
        if (FINAL.includes(error.status)) {
          this.drop(vote);
          this.listener.refused(vote, error);
          continue;
        }
        vote.sent = false;
        this.listener.trouble(error, this.waiting.length);
        await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
      }
    }
    this.sending = false;
  }

  drop(vote) {
    this.waiting = this.waiting.filter((other) => other.key !== vote.key);
    this.save();
  }
}

// Votes that tabs have left which are closed by now. A vote that two tabs send has one key, and is stored once.
function left() {
  const votes = [];
  try {
    for (const name of Object.keys(localStorage)) {
      if (!name.startsWith(PREFIX)) continue;
      votes.push(...JSON.parse(localStorage.getItem(name) ?? "[]"));
      localStorage.removeItem(name);
    }
  } catch {
    // Storage is forbidden: nothing was left.
  }
  return votes;
}

// What all views use: elements by their id, texts of people and models, short messages, who sits here.
import { kept, randomName } from "./net.js";
import { t } from "./words.js";

export const $ = (id) => document.getElementById(id);

const CHINESE = /[\u3400-\u9fff]/;

// Text of a person or a model is only ever text: no markup in it takes effect.
export function showText(element, text) {
  element.classList.toggle("nothing", !text.trim());
  element.textContent = text.trim() ? text : t("empty_answer");
  // Browsers choose the shapes of characters by it, and screen readers their voice.
  if (CHINESE.test(text)) element.lang = "zh-CN";
  else element.removeAttribute("lang");
}

export function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

let timer = 0;
export function toast(text) {
  const place = $("toast");
  place.textContent = text;
  place.classList.add("shown");
  clearTimeout(timer);
  timer = setTimeout(() => place.classList.remove("shown"), 3500);
}

// A line that stays until the trouble is over; `words` is asked again when the language changes.
let words = null;
export function banner(given) {
  words = given;
  showBanner();
}
export function showBanner() {
  $("banner").hidden = !words;
  $("banner").textContent = words ? words() : "";
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without https, outside of this machine, a browser has no clipboard for pages: the old way works there.
    const area = make("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  toast(t("copied"));
}

// A tab keeps its name when it is loaded again, and with it the pair on its screen.
export function tab() {
  try {
    const known = sessionStorage.getItem("tab") ?? randomName();
    sessionStorage.setItem("tab", known);
    return known;
  } catch {
    return (tab.own ??= randomName());
  }
}

// Who has typed no name is a guest, and no two guests are one.
export function person() {
  const typed = (kept.read("person") ?? "").trim();
  if (typed) return typed;
  let guest = kept.read("guest");
  if (!guest) kept.write("guest", (guest = `guest ${randomName().slice(0, 4)}`));
  return guest;
}

// The page: language, name, and which of its three views is shown.
import * as chat from "./chat.js";
import * as results from "./results.js";
import * as vote from "./vote.js";
import { get, kept } from "./net.js";
import { $, banner, person, showBanner } from "./parts.js";
import { currentLanguage, setLanguage, t } from "./words.js";

const VIEWS = { vote, chat, results };
let view = null;

function chosenLanguage() {
  const chosen = kept.read("language");
  if (chosen) return chosen;
  return navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
}

function speak(language) {
  setLanguage(language);
  $("language").textContent = language === "zh" ? "English" : "中文";
  $("language").lang = language === "zh" ? "en" : "zh-CN";
  $("person").placeholder = person();
  showBanner();
  if (view) VIEWS[view].show();
}

function open() {
  const wanted = location.hash.slice(1);
  view = wanted in VIEWS ? wanted : "vote";
  for (const name of Object.keys(VIEWS)) {
    $(`view-${name}`).hidden = name !== view;
    if (name === view) $(`tab-${name}`).setAttribute("aria-current", "page");
    else $(`tab-${name}`).removeAttribute("aria-current");
  }
  VIEWS[view].show();
}

$("language").addEventListener("click", () => {
  const other = currentLanguage() === "zh" ? "en" : "zh";
  kept.write("language", other);
  speak(other);
});

$("person").addEventListener("change", () => {
  const before = person();
  kept.write("person", $("person").value.trim());
  if (person() !== before) vote.restart();
});

// Another tab has another name: this one is the same person.
window.addEventListener("storage", (event) => {
  if (event.key !== "person") return;
  $("person").value = (kept.read("person") ?? "").trim();
  vote.restart();
});

document.addEventListener("keydown", (event) => {
  const modified = event.ctrlKey || event.altKey || event.metaKey;
  if (view === "vote" && !modified && !event.repeat) vote.key(event);
});
window.addEventListener("hashchange", open);

async function begin() {
  speak(chosenLanguage());
  $("person").value = (kept.read("person") ?? "").trim();
  let state = null;
  while (!state) {
    try {
      state = await get("/page/state");
    } catch {
      banner(() => t("offline", { count: 0 }));
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }
  banner(null);
  chat.start(state);
  vote.start(state);
  open();
}

begin();

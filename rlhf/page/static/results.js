// The view of results: versions against one another, how far to trust it, and the way back into training.
import { get, post } from "./net.js";
import { $, copy, make, toast } from "./parts.js";
import { funnelWords, percent, t } from "./words.js";

let person = "";
let asked = 0;
let lastExport = null;

export async function show() {
  const mine = ++asked;
  let found;
  try {
    found = await get("/page/results", person ? { person } : {});
  } catch (error) {
    return toast(error.message);
  }
  // The answer to an earlier question may come later.
  if (mine !== asked) return;
  const any = found.people.length > 0;
  $("results-empty").hidden = any;
  $("numbers").hidden = !any;
  if (!any) return;

  showWhose(found.people);
  const counts = { votes: found.votes, people: found.people.length, prompts: found.prompts };
  const skipped = found.skips ? ` · ${t("skipped", { count: found.skips })}` : "";
  $("summary").textContent = t(person || counts.people < 2 ? "summary_one" : "summary", counts) + skipped;
  $("version-pairs").replaceChildren(...found.pairs.map(versionPair));
  $("facts").replaceChildren(agreement(found.agreement), reward(found.reward), lengths(found.length));
  showExport();
}

function showWhose(people) {
  const options = [new Option(t("everybody"), "")];
  for (const { name, votes } of people) options.push(new Option(`${name} (${votes})`, name));
  $("whose").replaceChildren(...options);
  $("whose").value = person;
  $("whose").onchange = () => {
    person = $("whose").value;
    show();
  };
}

// ---- two versions ----
function versionPair(row) {
  const place = make("article", "duel");
  const [low, high] = row.interval;
  const winner = low > 0.5 ? row.first : high < 0.5 ? row.second : null;

  const head = make("div", "line");
  head.append(make("h3", "", `${row.first} – ${row.second}`));
  const verdict = make("span", winner ? "verdict" : "soft", winner ? t("is_better", { name: winner }) : t("undecided"));
  head.append(verdict);

  const parts = [
    ["wins", t("wins", { name: row.first })], ["ties", t("ties")], ["bad", t("bads")],
    ["losses", t("losses", { name: row.second })],
  ];
  const bar = make("div", "stack");
  bar.setAttribute("aria-hidden", "true");
  const legend = make("ul", "legend");
  for (const [name, words] of parts) {
    if (!row[name]) continue;
    const piece = make("span", name);
    piece.style.flexGrow = row[name];
    bar.append(piece);
    const item = make("li", name, `${words} ${row[name]}`);
    legend.append(item);
  }

  const text = make("p", "soft");
  text.append(t("wins_share", { first: row.first, second: row.second, share: percent(row.share) }), " · ", interval(row));
  place.append(head, bar, legend, scale(row), text);
  return place;
}

// The share with its interval, as a dot on a line from 0 to 100 %.
function scale({ share, interval: [low, high] }) {
  const line = make("div", "scale");
  line.setAttribute("aria-hidden", "true");
  const range = make("span", "range");
  range.style.left = `${100 * low}%`;
  range.style.width = `${100 * (high - low)}%`;
  const dot = make("span", "dot");
  dot.style.left = `${100 * share}%`;
  line.append(make("span", "half"), range, dot);
  return line;
}

const interval = ({ interval: [low, high] }) => t("interval", { low: percent(low), high: percent(high) });

// ---- how far to trust it ----
function fact(title, big, words, warning = "") {
  const place = make("article", "fact");
  place.append(make("h3", "", title));
  if (big) place.append(make("p", "big", big));
  place.append(make("p", "soft", words));
  if (warning) place.append(make("p", "warning", warning));
  return place;
}

function agreement(found) {
  if (!found.n) return fact(t("agreement"), "", t("agreement_none"));
  return fact(t("agreement"), percent(found.share), `${t("agreement_says", found)} · ${interval(found)}`);
}

function reward(found) {
  if (!found.n) return fact(t("reward"), "", t("reward_none"));
  return fact(t("reward"), percent(found.share), `${t("reward_says", found)} · ${interval(found)}`);
}

function lengths(found) {
  if (found.winners === null) return fact(t("lengths"), "", t("lengths_none"));
  const values = { winners: Math.round(found.winners), losers: Math.round(found.losers) };
  const longer = found.longer;
  const words = t("lengths_says", values) + (longer.n ? ` · ${interval(longer)}` : "");
  return fact(t("lengths"), longer.n ? percent(longer.share) : "", words, found.warning ? t("longer_warning") : "");
}

// ---- export ----
$("export").addEventListener("click", async () => {
  try {
    lastExport = await post("/page/export", {});
  } catch (error) {
    return toast(error.message);
  }
  showExport();
});

function showExport() {
  const place = $("exported");
  place.replaceChildren();
  if (!lastExport) return;
  if (lastExport.refused) place.append(make("p", "warning", lastExport.refused));
  place.append(funnel(lastExport.funnel));
  if (lastExport.refused) return;

  place.append(make("p", "", t("exported", { folder: lastExport.folder })));
  const files = make("p", "files");
  for (const name of lastExport.files) {
    const link = make("a", "", name);
    link.href = `/page/files/${name}`;
    link.download = name;
    files.append(link, " ");
  }
  const command = make("pre", "command", lastExport.command);
  command.tabIndex = 0;
  const button = make("button", "quiet", t("copy_command"));
  button.type = "button";
  button.addEventListener("click", () => copy(lastExport.command));
  place.append(files, make("p", "", t("then")), command, button);
}

function funnel(counts) {
  const words = funnelWords();
  const list = make("dl", "funnel");
  for (const [name, count] of Object.entries(counts)) {
    if (count) list.append(make("dt", "", String(count)), make("dd", "", words[name] ?? name));
  }
  return list;
}

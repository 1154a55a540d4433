// Every word that the page shows, in both languages.

const ENGLISH = {
  title: "Playground", views: "Views", vote: "Vote", chat: "Chat", results: "Results", your_name: "Your name",
  // vote
  progress: "Progress", progress_text: "{done} of {total} prompts", round: "round {round} of {rounds}",
  prompt: "Prompt", answer_1: "Answer 1", answer_2: "Answer 2", empty_answer: "(empty)",
  how_much: "How much better?", not_said: "not said", slightly: "slightly", clearly: "clearly", much: "much",
  reason: "Reason", optional: "optional", edit: "Edit the better one", your_vote: "Your vote",
  first_better: "Answer 1 is better", second_better: "Answer 2 is better", tie: "Equally good", bad: "Both bad",
  skip: "Skip", undo: "Undo", undone: "The vote is taken back.", nothing_to_undo: "There is no vote to take back.",
  chose_left: "Answer 1", chose_right: "Answer 2", chose_tie: "equally good", chose_bad: "both bad",
  chose_skip: "skipped", you_said: "You said: {choice}.", names: "Answer 1 was by {left}, answer 2 by {right}.",
  score: "score {score}", first_time: "Which answer is better? Which version wrote which is shown after your vote.", storing: "Storing it …", kept: "Kept in this browser until it is stored.",
  disk_full: "The disk of the server is full: {count} votes are kept in this browser and are sent again and again. Make room there.",
  offline: "The server does not answer: {count} votes are kept in this browser until it does.",
  too_busy: "The server is busy: trying again.", refused: "Not stored: {why}",
  writing: "The model is writing the next answers …",
  all_done: "All prompts are done. Thank you! The results are one tab to the right.",
  all_same: "All versions wrote the same text for every prompt, so there is nothing to choose between. Try --temperature, other prompts or other versions.",
  nothing_to_compare: "There are fewer than two versions, so there is nothing to compare. Start playground.py with --adapters, or with the --answers of several versions.",
  which_better: "Which one is better?", as_it_should_be: "The answer as it should be",
  edit_says: "This votes for the answer that you chose. Your text becomes a row for SFT.",
  save_vote: "Vote with this text", cancel: "Cancel", needs_change: "Choose the better answer and change its text first.",
  // chat
  no_model: "No model is loaded, so there is nobody to talk to. Start playground.py with --base_model_name and --adapters.",
  sampling: "Sampling settings", temperature: "Temperature", length: "Longest answer (tokens)",
  add_version: "Add a version", new_chat: "New conversation", say_something: "Write to all versions above …",
  message: "Message", send: "Send", stop: "Stop", version: "Version", mix: "mix of two …", remove: "Remove",
  mix_of: "from", mix_to: "to", mix_share: "How much of {to}", tokens: "{count} tokens", cut: "cut at the limit",
  stopped: "stopped", copy: "Copy", copied: "Copied.", regenerate: "Another draw", to_vote: "Send to vote",
  on_the_list: "The prompt is first on the list to vote on.", answering: "answering …", you: "You",
  bad_numbers: "Temperature is from 0 to 5, top_p from 0.01 to 1, the longest answer a whole number of tokens.",
  // results
  no_votes: "There are no votes yet.", whose: "Votes of", everybody: "everybody", versions: "Versions",
  summary: "{votes} votes of {people} people on {prompts} prompts", summary_one: "{votes} votes on {prompts} prompts",
  skipped: "{count} skipped", wins: "{name} wins", losses: "{name} wins", ties: "equally good", bads: "both bad",
  wins_share: "{first} against {second}: {share} won", interval: "95\u00a0% interval: {low} to {high}",
  is_better: "{name} is better", undecided: "not decided yet", trust: "How far to trust it",
  agreement: "Agreement between people", agreement_none: "No pair has votes of two people yet.",
  agreement_says: "on {n} pairs that several people saw",
  reward: "Agreement of the reward model", reward_none: "The answers have no scores.",
  reward_says: "on {n} preferences: it scores the preferred answer higher",
  lengths: "The longer answer is preferred", lengths_none: "No preference yet.",
  lengths_says: "preferred answers have {winners} characters on average, the others {losers}",
  longer_warning: "The longer answer mostly wins: a reward model trained on these votes may learn length.",
  train_on_it: "Train on it",
  export_says: "Writes the votes as pairs for reward_modeling.py, edited answers as rows for SFT, and bad answers for the audit.",
  export: "Export", exported: "Written into {folder}:", then: "Train a reward model on it:", copy_command: "Copy the command",
  funnel: {
    votes: "votes", skips: "skipped", repeated: "further votes on a pair, taken together with the first",
    contradicted: "pairs on which people contradict one another (the majority counts)", ties: "ties, left out",
    bad: "pairs with two bad answers, left out", undecided: "pairs without a majority, left out",
    empty: "pairs with an empty answer, left out", pairs: "pairs to train on", edited: "edited answers for SFT",
    bad_answers: "bad answers for the audit",
  },
};

const CHINESE = {
  title: "试验场", views: "页面", vote: "投票", chat: "对话", results: "结果", your_name: "你的名字",
  progress: "进度", progress_text: "已完成 {done} / {total} 个提示", round: "第 {round} 轮，共 {rounds} 轮",
  prompt: "提示", answer_1: "回答 1", answer_2: "回答 2", empty_answer: "（空）",
  how_much: "好多少？", not_said: "不说", slightly: "略好", clearly: "明显", much: "好得多",
  reason: "理由", optional: "可不填", edit: "修改较好的回答", your_vote: "你的选择",
  first_better: "回答 1 更好", second_better: "回答 2 更好", tie: "一样好", bad: "都不好",
  skip: "跳过", undo: "撤销", undone: "这一票已撤销。", nothing_to_undo: "没有可以撤销的票。",
  chose_left: "回答 1", chose_right: "回答 2", chose_tie: "一样好", chose_bad: "都不好",
  chose_skip: "跳过", you_said: "你选了：{choice}。", names: "回答 1 出自 {left}，回答 2 出自 {right}。",
  score: "得分 {score}", first_time: "哪个回答更好？投票之后才显示哪个回答出自哪个版本。", storing: "正在保存……", kept: "暂存在浏览器里，等待保存。",
  disk_full: "服务器的磁盘已满：{count} 票暂存在这个浏览器里，会不断重新发送。请在服务器上腾出空间。",
  offline: "服务器没有响应：{count} 票暂存在这个浏览器里，恢复后自动发送。",
  too_busy: "服务器正忙，稍后重试。", refused: "没有保存：{why}",
  writing: "模型正在写下一组回答……",
  all_done: "所有提示都完成了，谢谢！结果在“结果”页。",
  all_same: "所有版本对每个提示都写了相同的文字，没有可选择的。可以改变 --temperature，换提示或换版本。",
  nothing_to_compare: "不足两个版本，没有可比较的。请用 --adapters 启动 playground.py，或用含多个版本的 --answers。",
  which_better: "哪个更好？", as_it_should_be: "回答应该是这样",
  edit_says: "这会给你选的回答投一票，你写的文字成为一条 SFT 数据。",
  save_vote: "用这段文字投票", cancel: "取消", needs_change: "请先选出较好的回答，并修改它。",
  no_model: "没有载入模型，无法对话。请用 --base_model_name 和 --adapters 启动 playground.py。",
  sampling: "采样设置", temperature: "温度", length: "最长回答（token）",
  add_version: "增加一个版本", new_chat: "新对话", say_something: "写给上面所有版本……",
  message: "消息", send: "发送", stop: "停止", version: "版本", mix: "两个版本混合……", remove: "移除",
  mix_of: "从", mix_to: "到", mix_share: "{to} 占多少", tokens: "{count} 个 token", cut: "到上限被截断",
  stopped: "已停止", copy: "复制", copied: "已复制。", regenerate: "再来一次", to_vote: "送去投票",
  on_the_list: "这个提示已排在投票的最前面。", answering: "正在回答……", you: "你",
  bad_numbers: "温度为 0 到 5，top_p 为 0.01 到 1，最长回答为整数个 token。",
  no_votes: "还没有投票。", whose: "谁的票", everybody: "所有人", versions: "各个版本",
  summary: "{people} 人对 {prompts} 个提示投了 {votes} 票", summary_one: "对 {prompts} 个提示投了 {votes} 票",
  skipped: "跳过 {count} 次", wins: "{name} 胜", losses: "{name} 胜", ties: "一样好", bads: "都不好",
  wins_share: "{first} 对 {second}：胜率 {share}", interval: "95% 区间：{low} 到 {high}",
  is_better: "{name} 更好", undecided: "尚无定论", trust: "有多可信",
  agreement: "人与人是否一致", agreement_none: "还没有两个人投过同一组回答。",
  agreement_says: "在 {n} 组多人看过的回答上",
  reward: "奖励模型是否一致", reward_none: "这些回答没有得分。",
  reward_says: "在 {n} 个偏好上，它给被选的回答打分更高",
  lengths: "较长的回答被选中", lengths_none: "还没有偏好。",
  lengths_says: "被选的回答平均 {winners} 个字符，另一个 {losers} 个",
  longer_warning: "较长的回答大多被选中：用这些票训练的奖励模型可能只学会长度。",
  train_on_it: "用它训练",
  export_says: "把投票写成 reward_modeling.py 的偏好对、SFT 用的修改后回答，以及审计用的坏回答。",
  export: "导出", exported: "已写入 {folder}：", then: "用它训练奖励模型：", copy_command: "复制命令",
  funnel: {
    votes: "票", skips: "跳过", repeated: "同一组的其他票，与第一票合并",
    contradicted: "组里意见相反（以多数为准）", ties: "组一样好，不用",
    bad: "组都不好，不用", undecided: "组没有多数，不用",
    empty: "组里有空回答，不用", pairs: "个偏好对可供训练", edited: "条修改后的回答供 SFT",
    bad_answers: "条坏回答供审计",
  },
};

export const LANGUAGES = { en: ENGLISH, zh: CHINESE };
let language = "en";

export function setLanguage(name) {
  language = name;
  document.documentElement.lang = name === "zh" ? "zh-CN" : "en";
  document.title = t("title");
  for (const element of document.querySelectorAll("[data-t]")) element.textContent = t(element.dataset.t);
  for (const element of document.querySelectorAll("[data-t-label]")) {
    element.setAttribute("aria-label", t(element.dataset.tLabel));
  }
  for (const element of document.querySelectorAll("[data-t-placeholder]")) {
    element.placeholder = t(element.dataset.tPlaceholder);
  }
}

export const currentLanguage = () => language;
export const funnelWords = () => LANGUAGES[language].funnel;

// A word with its {places} filled in.
export function t(key, values = {}) {
  const text = LANGUAGES[language][key] ?? key;
  return text.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? String(values[name]) : whole));
}

export const percent = (share) => language === "zh" ? `${Math.round(100 * share)}%` : `${Math.round(100 * share)}\u00a0%`;

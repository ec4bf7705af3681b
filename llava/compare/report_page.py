"""The frame, the style and the script of `report.html`."""

from string import Template

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>$TITLE</title>
<style>$STYLE</style>
</head>
<body>
<main>
<h1>$TITLE</h1>
<nav aria-label="Parts of this report"><ul>$LINKS</ul></nav>
$PARTS
</main>
</body>
</html>
""")

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #212529; --faint: #59626b; --line: #d5dae0; --raised: #f4f6f8;
  --good: #12692f; --bad: #b3261e; --good-back: #e3f4e8; --bad-back: #fdeaea; --accent: #205cb8; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181c; --ink: #e6e8ea; --faint: #a3abb3; --line: #3a4048;
  --raised: #1f2329; --good: #7fdc9c; --bad: #ff9a92; --good-back: #17331f; --bad-back: #401d1c; --accent: #8ab4f8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1280px; margin: 0 auto; padding: 16px 24px 64px; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 8px 0; }
h2 { font-size: 1.25rem; margin: 40px 0 8px; padding-top: 8px; border-top: 1px solid var(--line); }
p { max-width: 80ch; }
a { color: var(--accent); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
nav ul { display: flex; flex-wrap: wrap; gap: 4px 20px; list-style: none; margin: 0; padding: 0; font-size: .9rem; }
.notes { border-left: 4px solid var(--accent); background: var(--raised); padding: 8px 16px 8px 32px; margin: 16px 0; }
.box { overflow: auto; width: fit-content; max-width: 100%; max-height: 80vh; margin: 16px 0;
  border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: separate; border-spacing: 0; font-size: .88rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 8px 12px; }
caption > span { display: block; position: sticky; left: 12px; width: fit-content; max-width: calc(100vw - 64px); }
th, td { padding: 6px 12px; text-align: left; vertical-align: top; border-top: 1px solid var(--line);
  overflow-wrap: break-word; white-space: nowrap; }
.right { text-align: right; }
.long { white-space: normal; min-width: 18em; overflow-wrap: anywhere; }
thead th { vertical-align: bottom; white-space: normal; min-width: 7em; max-width: 14em; background: var(--raised);
  position: sticky; top: 0; z-index: 1; }
th:first-child { position: sticky; left: 0; background: var(--raised); }
thead th:first-child { z-index: 2; }
tbody th { font-weight: 600; }
figure { margin: 16px 0; }
figure .box { background: #fff; margin: 0; max-height: none; }
figure img { display: block; min-width: 560px; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { color: var(--faint); font-size: .88rem; margin-top: 4px; }
form { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: 12px; align-items: end;
  background: var(--raised); border: 1px solid var(--line); border-radius: 6px; padding: 12px 16px; }
label { display: block; font-size: .88rem; color: var(--faint); }
select, input, button { width: 100%; min-height: 40px; font: inherit; color: var(--ink); background: var(--paper);
  border: 1px solid var(--faint); border-radius: 4px; padding: 6px 8px; }
button { cursor: pointer; }
#more { max-width: 320px; display: block; margin: 16px auto; }
#cards { list-style: none; padding: 0; margin: 0; display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); }
#cards > li { border: 1px solid var(--line); border-radius: 6px; padding: 12px; display: grid; gap: 12px; min-width: 0;
  grid-template-columns: 128px minmax(0, 1fr); align-content: start; }
#cards h3 { font-size: 1rem; line-height: 1.35; margin: 0; }
#cards p { margin: 4px 0; font-size: .88rem; }
#cards .faint { color: var(--faint); }
.shots { display: grid; gap: 6px; align-content: start; }
.shots img { width: 128px; height: 128px; object-fit: contain; background: var(--raised); border-radius: 4px; }
.shots img.few { image-rendering: pixelated; }
.gone { min-height: 128px; border: 1px dashed var(--faint); border-radius: 4px; padding: 8px; font-size: .8rem;
  color: var(--faint); display: grid; place-content: center; text-align: center; overflow-wrap: anywhere; }
.said { width: 100%; grid-column: 1 / -1; }
.said th, .said td { padding: 3px 6px; white-space: normal; overflow-wrap: anywhere; background: none; text-align: left;
  min-width: 0; position: static; }
.said wbr { display: inline; }
.said th:first-child { width: 42%; max-width: none; background: none; }
.said td:last-child { text-align: right; white-space: nowrap; overflow-wrap: normal; }
.said thead th { color: var(--faint); font-weight: 400; }
.said tr.chosen > th { text-decoration: underline; text-underline-offset: 3px; }
.word { display: inline-block; border-radius: 4px; padding: 0 6px; margin: 0 4px 2px 0; }
.good { color: var(--good); background: var(--good-back); }
.bad { color: var(--bad); background: var(--bad-back); }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
@media (min-width: 641px) { wbr { display: none; } }
@media (max-width: 640px) { main { padding: 8px 12px 48px; } h1 { font-size: 1.35rem; }
  th, td { padding: 6px 8px; }
  .box th:first-child { min-width: 8em; max-width: 9em; white-space: normal; overflow-wrap: anywhere; }
  form { grid-template-columns: 1fr 1fr; padding: 12px; gap: 8px; }
  #cards > li { grid-template-columns: 88px minmax(0, 1fr); } .shots img { width: 88px; height: 88px; }
  .gone { min-height: 88px; padding: 4px; font-size: .7rem; } }
@media print { .box { overflow: visible; max-height: none; } form, #more { display: none; } }
"""

EXPLORER = """<form id="choice" role="search" aria-label="Questions on which towers disagree">
<label>Right: tower A <select name="a"></select></label>
<label>Wrong: tower B <select name="b"></select></label>
<label>Evaluation <select name="evaluation"></select></label>
<label>Kind <select name="kind"></select></label>
<label>Search <input name="q" type="search" autocomplete="off" placeholder="question, answer, id"></label>
<label>Sort by <select name="sort"></select></label>
<button type="button" id="swap">Swap A and B</button>
</form>
<p id="count" role="status" aria-live="polite"></p>
<ol id="cards"></ol>
<button type="button" id="more" hidden>Show more</button>
<noscript><p>Choosing among the questions needs JavaScript; the table above has their numbers.</p></noscript>"""

# The state of the form is also the address's fragment (#a=clip&b=siglip&q=digit), so that what is seen can be linked.
SCRIPT = """
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const form = document.getElementById("choice"), cards = document.getElementById("cards");
  const more = document.getElementById("more"), count = document.getElementById("count");
  const NAMES = ["a", "b", "evaluation", "kind", "q", "sort"], STEP = 24;
  const SORTS = { file: "order in the file", gap: "largest gap, A to B", hard: "fewest towers right",
    question: "question, A to Z", kind: "kind, A to Z" };
  let room = STEP;

  const make = (tag, text, kind) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (kind) node.className = kind;
    return node;
  };
  const fill = (name, entries) => {
    for (const [value, text] of entries) {
      const option = make("option", text);
      option.value = value;
      form.elements[name].append(option);
    }
  };
  const right = (question, tower) => {
    const said = question.said[tower] || [];
    return said.length ? said.filter(row => row[2]).length / said.length : NaN;
  };
  const compare = (x, y) => x.localeCompare(y, "en", { numeric: true });

  function wanted(question, state) {
    const reads = tower => right(question, tower) > 0.5, fails = tower => right(question, tower) < 0.5;
    if (!(state.a ? reads(state.a) : data.towers.some(reads))) return false;
    if (!(state.b ? fails(state.b) : data.towers.some(fails))) return false;
    if (state.evaluation && question.evaluation !== state.evaluation) return false;
    if (state.kind && question.kind !== state.kind) return false;
    const text = [question.question, question.answer, question.id].join("\\n").toLowerCase();
    return state.q.toLowerCase().split(/\\s+/).every(word => text.includes(word));
  }

  function sorted(questions, state) {
    const shares = question => data.towers.map(tower => right(question, tower)).filter(share => share >= 0);
    const gap = question => {
      const of = shares(question);
      const high = state.a ? right(question, state.a) : Math.max(...of);
      return high - (state.b ? right(question, state.b) : Math.min(...of));
    };
    const mean = question => shares(question).reduce((sum, share) => sum + share, 0) / shares(question).length;
    const orders = {
      gap: (x, y) => gap(y) - gap(x), hard: (x, y) => mean(x) - mean(y),
      question: (x, y) => compare(x.question, y.question), kind: (x, y) => compare(x.kind, y.kind),
    };
    return orders[state.sort] ? [...questions].sort(orders[state.sort]) : questions;
  }

  function shots(question) {
    const box = make("div", undefined, "shots");
    for (const place of question.pictures) {
      const picture = data.pictures[place];
      if (!picture.data) {
        box.append(make("div", "cannot be read: " + picture.name, "gone"));
        continue;
      }
      const image = make("img");
      image.alt = "picture " + picture.name;
      image.title = picture.name;
      image.onload = () => { if (Math.max(image.naturalWidth, image.naturalHeight) <= 64) image.className = "few"; };
      image.src = picture.data;
      box.append(image);
    }
    if (!question.pictures.length) box.append(make("div", "no picture", "gone"));
    if (question.more) box.append(make("div", "and " + question.more + " more", "faint"));
    return box;
  }

  function answers(question, state) {
    const table = make("table", undefined, "said"), head = make("tr"), body = make("tbody");
    table.append(make("caption", "What each tower's model says", "unseen"), make("thead"), body);
    table.tHead.append(head);
    for (const title of ["tower", "says", "seeds right"]) {
      head.append(Object.assign(make("th", title), { scope: "col" }));
    }
    for (const tower of data.towers) {
      const said = question.said[tower];
      if (!said) continue;
      const row = make("tr", undefined, tower === state.a || tower === state.b ? "chosen" : "");
      const cell = make("td"), words = new Map();
      for (const [seed, text, ok] of said) {
        const key = JSON.stringify([text, ok]);
        words.set(key, [text, ok, [...(words.get(key)?.[2] || []), seed]]);
      }
      for (const [text, ok, seeds] of words.values()) {
        const word = make("span", (ok ? "✓ " : "✗ ") + (text || "(nothing)"), ok ? "word good" : "word bad");
        word.append(make("span", ok ? " right" : " wrong", "unseen"));
        if (words.size > 1) word.append(" (seed" + (seeds.length > 1 ? "s " : " ") + seeds.join(", ") + ")");
        cell.append(word);
      }
      const name = Object.assign(make("th"), { scope: "row" });
      for (const piece of tower.split(/(?<=_)/)) name.append(piece, make("wbr"));
      const share = make("td", said.filter(entry => entry[2]).length + " of " + said.length);
      row.append(name, cell, share);
      body.append(row);
    }
    return table;
  }

  function card(question, state) {
    const item = make("li"), words = make("div");
    words.append(make("h3", question.question));
    const truth = make("p", "Answer: ");
    truth.append(make("strong", question.answer || "(nothing)"));
    const kind = question.kind ? question.kind + ", " : "";
    words.append(truth, make("p", kind + question.evaluation + ", id " + question.id, "faint"));
    item.append(shots(question), words, answers(question, state));
    return item;
  }

  const state = () => Object.fromEntries(NAMES.map(name => [name, form.elements[name].value.trim()]));

  function show() {
    const now = state(), found = sorted(data.questions.filter(question => wanted(question, now)), now);
    cards.replaceChildren(...found.slice(0, room).map(question => card(question, now)));
    more.hidden = found.length <= room;
    const who = (now.a || "any tower") + " right, " + (now.b || "any tower") + " wrong";
    count.textContent = now.a && now.a === now.b ? "Choose two different towers."
      : who + ": " + found.length + (found.length === 1 ? " question" : " questions")
        + (more.hidden ? "." : ", " + room + " shown.");
  }

  function changed() {
    room = STEP;
    const given = new URLSearchParams(Object.entries(state()).filter(([name, value]) => value
      && !(name === "sort" && value === "file")));
    history.replaceState(null, "", "#" + (given.toString() || "a="));
    show();
  }

  function follow() {
    if (!location.hash.includes("=")) return;  // a link to a part of the report
    const given = new URLSearchParams(location.hash.slice(1));
    for (const name of NAMES) {
      const field = form.elements[name], value = given.get(name) || "";
      if (field.options) field.selectedIndex = Math.max(0, [...field.options].findIndex(o => o.value === value));
      else field.value = value;
    }
    room = STEP;
    show();
  }

  const kinds = [...new Set(data.questions.map(question => question.kind).filter(kind => kind))].sort(compare);
  const named = list => list.map(name => [name, name]);
  fill("a", [["", "any"], ...named(data.towers)]);
  fill("b", [["", "any"], ...named(data.towers)]);
  fill("evaluation", [["", "all"], ...named(data.evaluations)]);
  fill("kind", [["", "all"], ...named(kinds)]);
  fill("sort", Object.entries(SORTS));
  form.addEventListener("input", changed);
  form.addEventListener("submit", event => event.preventDefault());
  document.getElementById("swap").addEventListener("click", () => {
    [form.elements.a.value, form.elements.b.value] = [form.elements.b.value, form.elements.a.value];
    changed();
  });
  more.addEventListener("click", () => {
    const first = room;
    room += STEP;
    show();
    const next = cards.children[first];  // where reading goes on
    if (next) { next.tabIndex = -1; next.focus(); }
  });
  addEventListener("hashchange", follow);
  show();
  follow();
})();
"""

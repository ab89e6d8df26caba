// The samples of a report. What a model wrote is only ever set as textContent: there is no innerHTML in this file, and
// the page's policy (require-trusted-types-for 'script') would refuse it.
"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const data = read("data");
  const packed = read("chunks");
  const col = data.columns;
  const total = col.item.length;
  const PAGE = 20;
  const SHORT = 2400; // characters of a text that are shown at first
  const MARKS = {
    right: "✓ right", partly: "◐ partly", wrong: "✗ wrong", scored: "scored", unscored: "no score",
    silent: "∅ empty", truncated: "… truncated", infra: "! infra error",
  };
  const byId = (id) => document.getElementById(id);
  const filters = byId("filters");
  const list = byId("list");

  function el(tag, name, ...children) {
    const made = document.createElement(tag);
    if (name) made.className = name;
    made.append(...children);
    return made;
  }

  // ---- chunks

  const chunks = new Map();
  async function chunk(number) {
    if (!chunks.has(number)) {
      const bytes = Uint8Array.from(atob(packed[number]), (c) => c.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      chunks.set(number, new Response(stream).json());
    }
    return chunks.get(number);
  }
  const detail = async (n) => (await chunk(Math.floor(n / data.chunk)))[n % data.chunk];

  const texts = new Map(); // of each chunk, what is searched, in lower case
  async function searched(number) {
    if (!texts.has(number)) {
      const rows = await chunk(number);
      texts.set(number, rows.map((r, i) => [
        col.item[number * data.chunk + i], r.prompt, r.reply, r.thinking, r.gold, ...Object.values(r.evidence),
        r.more.tests ?? "", r.transcript ? JSON.stringify(r.transcript) : "",
      ].join("\n").toLowerCase()));
    }
    return texts.get(number);
  }

  // ---- filters

  const state = { show: "all", task: "", run: "", q: "", page: 0 };
  const stateOf = (n) => data.states[col.state[n]];
  const SHOWS = {
    all: () => true,
    right: (n) => stateOf(n) === "right",
    partly: (n) => stateOf(n) === "partly",
    wrong: (n) => ["wrong", "silent", "truncated"].includes(stateOf(n)),
    cut: (n) => col.cut[n] === 1,
    silent: (n) => stateOf(n) === "silent",
    infra: (n) => stateOf(n) === "infra",
    better: (n) => col.change[n] > 0,
    worse: (n) => col.change[n] < 0,
  };
  let found = [];
  let turn = 0; // of the filter: an older search that ends later is dropped

  async function filter(focus) {
    const mine = ++turn;
    const task = state.task === "" ? -1 : Number(state.task);
    const run = state.run === "" ? -1 : Number(state.run);
    let base = [];
    for (let n = 0; n < total; n++) {
      if ((task < 0 || col.task[n] === task) && (run < 0 || col.run[n] === run)) base.push(n);
    }
    const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
    if (words.length) {
      const kept = [];
      for (let at = 0; at < base.length;) {
        const number = Math.floor(base[at] / data.chunk);
        const rows = await searched(number);
        if (mine !== turn) return;
        if (at && number % 20 === 0) say(`searching, ${Math.round((100 * at) / base.length)} %`);
        for (; at < base.length && Math.floor(base[at] / data.chunk) === number; at++) {
          const text = rows[base[at] % data.chunk];
          if (words.every((word) => text.includes(word))) kept.push(base[at]);
        }
      }
      base = kept;
    }
    for (const mark of filters.querySelectorAll("[data-count]")) {
      const count = base.filter(SHOWS[mark.dataset.count]).length;
      mark.textContent = count.toLocaleString("en");
      const chip = mark.closest("label");
      const never = ["partly", "silent", "infra", "cut"].includes(mark.dataset.count);
      chip.hidden = never && count === 0 && state.show !== mark.dataset.count;
    }
    found = base.filter(SHOWS[state.show]);
    state.page = Math.min(state.page, Math.max(0, Math.ceil(found.length / PAGE) - 1));
    await draw(focus, mine);
  }

  function say(text) {
    byId("found").textContent = text;
    byId("found-below").textContent = text;
  }

  // ---- one page

  async function draw(focus, mine = ++turn) {
    const start = state.page * PAGE;
    const shown = found.slice(start, start + PAGE);
    const rows = await Promise.all(shown.map(detail));
    if (mine !== turn) return;
    list.replaceChildren(...shown.map((n, i) => card(n, rows[i])));
    const count = found.length.toLocaleString("en");
    const last = start + shown.length;
    say(found.length ? `${(start + 1).toLocaleString("en")} to ${last.toLocaleString("en")} of ${count}`
      : "No sample fits these filters.");
    for (const end of ["", "-below"]) {
      byId(`earlier${end}`).disabled = start === 0;
      byId(`later${end}`).disabled = last >= found.length;
    }
    keep();
    if (focus) {
      const card = focus === "last" ? list.lastElementChild : list.firstElementChild;
      if (card) { card.focus({ preventScroll: true }); card.scrollIntoView({ block: "start" }); }
    }
  }

  function card(n, row) {
    const name = stateOf(n);
    const made = el("article", name);
    made.tabIndex = -1;
    const title = el("h3", "", el("span", "task", data.tasks[col.task[n]]), " ", el("span", "item", col.item[n]));
    if (data.runs.length > 1) title.append(" ", el("span", `label run${col.run[n] % 4}`, data.runs[col.run[n]]));
    const score = col.score[n];
    const mark = el("span", `mark ${name}`, MARKS[name]);
    const head = el("div", "head", mark, title);
    const facts = [];
    if (score !== null && (name === "partly" || name === "scored")) facts.push(`score ${Number(score.toPrecision(4))}`);
    if (col.repeat[n]) facts.push(`answer ${col.repeat[n] + 1}`);
    if (col.cut[n] && name !== "truncated") facts.push("truncated");
    if (row.tokens.completion !== undefined) facts.push(`${row.tokens.completion.toLocaleString("en")} tokens`);
    if (row.seconds !== null) facts.push(`${Number(row.seconds.toPrecision(2))} s`);
    head.append(el("span", "facts", facts.join(" · ")));
    made.append(head);

    const seen = row.media.filter((one) => one !== null && Object.hasOwn(data.media, one));
    const lost = row.media.length - seen.length;
    const body = el("div", seen.length ? "body seen" : "body");
    if (seen.length) body.append(pictures(n, seen));
    const words = el("div", "words");
    words.append(part("Prompt", text(row.prompt)));
    if (lost) {
      words.append(el("p", "nothing", `${lost} of ${row.media.length} pictures are missing, or are no pictures`));
    }
    if (row.thinking) {
      const more = el("details", "thinking");
      more.open = allThoughts;
      const size = row.tokens.thinking ? `${row.tokens.thinking.toLocaleString("en")} tokens`
        : `${row.thinking.length.toLocaleString("en")} characters`;
      more.append(el("summary", "", `Thinking, ${size}`), text(row.thinking));
      words.append(more);
    }
    if (row.transcript) words.append(transcript(row.transcript));
    const pair = el("div", "pair");
    pair.append(part(row.transcript ? "Result" : "Answer", row.reply ? text(row.reply) : el("p", "nothing", ["scored", "unscored"].includes(name) || !row.thinking
      ? "nothing" : "nothing after the thoughts")));
    if (row.gold) pair.append(part("Gold", text(row.gold)));
    words.append(pair);
    const evidence = el("dl", "evidence");
    const add = (key, value) => value && evidence.append(el("div", "", el("dt", "", key), el("dd", "", value)));
    for (const [key, value] of Object.entries(row.evidence)) add(key, value.length > 600 ? text(value) : value);
    if (row.status !== "graded") add("status", row.status);
    for (const [key, value] of Object.entries(row.more)) add(key, value.length > 600 ? text(value) : value);
    add("grader", row.kind);
    if (row.cluster !== col.item[n]) add("cluster", row.cluster);
    add("finish", row.finish_reason);
    if (evidence.childElementCount) {
      const more = el("details", "", el("summary", "", "Evidence"), evidence);
      more.open = !["right", "scored", "unscored"].includes(name) && Object.keys(row.evidence).length > 0;
      words.append(more);
    }
    body.append(words);
    made.append(body);
    return made;
  }

  // an agent's messages and calls, one after the other
  function transcript(turns) {
    const made = el("details", "transcript");
    const count = turns.filter((turn) => turn.shown === undefined).length;
    made.append(el("summary", "", `Transcript, ${count} ${count === 1 ? "message" : "messages"}`));
    let number = 0;
    for (const turn of turns) {
      if (turn.shown !== undefined) { made.append(part("It was told", text(turn.shown))); continue; }
      number += 1;
      const facts = [];
      if (turn.tokens !== undefined) facts.push(`${turn.tokens.toLocaleString("en")} tokens`);
      if (turn.seconds !== undefined) facts.push(`${Number(turn.seconds.toPrecision(2))} s`);
      const step = el("div", "step", el("h5", "", `${number}`, el("span", "facts", facts.join(" · "))));
      if (turn.thinking) {
        const more = el("details", "thinking", el("summary", "", "Thinking"), text(turn.thinking));
        more.open = allThoughts;
        step.append(more);
      }
      if (turn.text) step.append(text(turn.text));
      for (const call of turn.calls) {
        step.append(el("div", call.ok ? "call" : "call failed", el("code", "", call.name), text(call.arguments)));
        if (call.result) step.append(text(call.result));
      }
      made.append(step);
    }
    return made;
  }

  const part = (title, content) => el("div", "part", el("h4", "", title), content);

  function text(value) {
    const box = el("pre", "", value);
    if (value.length <= SHORT) return box;
    const half = SHORT / 2; // the end matters as much as the start: answers stand there
    box.textContent = `${value.slice(0, half)}\n⋯\n${value.slice(-half)}`;
    const more = el("button", "more", `Show all ${value.length.toLocaleString("en")} characters`);
    more.type = "button";
    more.addEventListener("click", () => { box.textContent = value; box.tabIndex = -1; more.remove(); box.focus(); });
    return el("div", "", box, more);
  }

  function pictures(n, names) {
    const made = el("div", names.length > 1 ? "pictures several" : "pictures");
    names.forEach((name, i) => {
      const image = new Image();
      image.loading = "lazy";
      image.decoding = "async";
      image.alt = `Picture ${i + 1} of ${names.length} of ${col.item[n]}`;
      image.addEventListener("load", () => {
        if (Math.max(image.naturalWidth, image.naturalHeight) <= 160) image.classList.add("small");
      });
      image.src = data.media[name];
      made.append(image);
    });
    return made;
  }

  // ---- controls

  let allThoughts = false;
  function thoughts() {
    allThoughts = !allThoughts;
    for (const one of list.querySelectorAll("details.thinking")) one.open = allThoughts;
    byId("thoughts").setAttribute("aria-pressed", String(allThoughts));
    byId("thoughts").textContent = allThoughts ? "Close thoughts" : "Open thoughts";
  }
  function theme() {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  }
  function page(step, focus) {
    const pages = Math.ceil(found.length / PAGE);
    const next = state.page + step;
    if (next < 0 || next >= pages) return;
    state.page = next;
    draw(focus ?? "first");
  }
  function show(name) {
    state.show = name;
    state.page = 0;
    filters.elements.show.value = name;
    filter();
  }
  function step(by) {
    const cards = [...list.children];
    const at = cards.findIndex((one) => one.contains(document.activeElement));
    const next = at < 0 ? (by > 0 ? 0 : cards.length - 1) : at + by;
    if (next >= cards.length) { page(1, "first"); return; }
    if (next < 0) { page(-1, "last"); return; }
    cards[next].focus({ preventScroll: true });
    cards[next].scrollIntoView({ block: "start" });
  }

  // the filters stand in the address, so that a view can be kept and sent
  let kept = "";
  function keep() {
    const parts = new URLSearchParams();
    for (const name of ["show", "task", "run", "q"]) {
      if (state[name] !== "" && state[name] !== "all") parts.set(name, state[name]);
    }
    if (state.page) parts.set("page", String(state.page + 1));
    kept = parts.toString();
    const next = kept ? `#${kept}` : location.pathname + location.search;
    try { history.replaceState(null, "", next); } catch { /* a page that was opened in a frame has no address */ }
  }
  function restore() {
    const parts = new URLSearchParams(location.hash.slice(1));
    const known = (value, most) => (/^\d+$/.test(value ?? "") && Number(value) < most ? value : "");
    state.show = Object.hasOwn(SHOWS, parts.get("show") ?? "") ? parts.get("show") : "all";
    state.task = known(parts.get("task"), data.tasks.length);
    state.run = known(parts.get("run"), data.runs.length);
    state.q = parts.get("q") ?? "";
    state.page = Math.max(0, Number(parts.get("page") ?? 1) - 1) || 0;
    for (const name of ["show", "task", "run", "q"]) filters.elements[name].value = state[name];
  }

  function choices(select, names, all) {
    select.append(new Option(all, ""));
    names.forEach((name, i) => select.append(new Option(name, String(i))));
  }
  choices(filters.elements.task, data.tasks, "all");
  choices(filters.elements.run, data.runs, "all");
  byId("pick-run").hidden = data.runs.length < 2;
  filters.hidden = false;
  for (const bar of document.querySelectorAll(".bar")) bar.hidden = false;

  filters.addEventListener("submit", (event) => event.preventDefault());
  filters.addEventListener("change", (event) => {
    if (event.target.name === "q") return;
    state[event.target.name] = event.target.value;
    state.page = 0;
    filter();
  });
  let wait = 0;
  filters.elements.q.addEventListener("input", (event) => {
    clearTimeout(wait);
    wait = setTimeout(() => { state.q = event.target.value; state.page = 0; filter(); }, 150);
  });
  byId("earlier").addEventListener("click", () => page(-1));
  byId("later").addEventListener("click", () => page(1));
  byId("earlier-below").addEventListener("click", () => page(-1));
  byId("later-below").addEventListener("click", () => page(1));
  byId("thoughts").addEventListener("click", thoughts);
  byId("theme").addEventListener("click", theme);
  byId("keys").addEventListener("click", () => byId("help").showModal());
  addEventListener("hashchange", () => {
    if (location.hash.slice(1) === kept || !location.hash.includes("=")) return;
    restore();
    filter();
  });

  const KEYS = {
    j: () => step(1), k: () => step(-1), n: () => page(1), p: () => page(-1), t: thoughts, d: theme,
    a: () => show("all"), r: () => show("right"), w: () => show("wrong"), x: () => show("cut"), i: () => show("infra"),
    "/": () => { filters.elements.q.focus(); filters.elements.q.select(); }, "?": () => byId("help").showModal(),
  };
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
    const at = event.target;
    if (at.name === "q" && event.key === "Escape") { at.blur(); return; }
    if (at.matches("input[type=search], select, textarea") || !Object.hasOwn(KEYS, event.key)) return;
    event.preventDefault();
    KEYS[event.key]();
  });

  restore();
  filter();
})();

"use strict";
// The rows are in the page already, escaped by the program that wrote it. They are filtered, put in order and shown a hundred at a time;
// strings of records reach the document as text alone, and the plots through `plain`.
(() => {
  const PAGE = 100, BARS = 16, MARKS = 120, LINES = 8, FLOOR = 2e-5;
  const NUMBERS = new Set(["batch", "base", "ours", "fast", "agreement", "bytes"]);
  const $ = id => document.getElementById(id);
  const table = $("records"), body = table.tBodies[0], filters = [...document.querySelectorAll("#filters select")];
  const rows = JSON.parse($("data").textContent).map(row => ({ ...row, element: document.getElementById("r-" + row.id) }));
  const byId = new Map(rows.map(row => [row.id, row]));
  const columns = [...table.tHead.rows[0].cells].map(cell => cell.dataset.key);
  const collator = new Intl.Collator("en", { numeric: true });
  let sort = { key: null, descending: false }, shown = PAGE, visible = rows, pending = true; // pending: frontiers are not drawn yet

  const value = (row, key) => {
    if (key === "fast") return row.record.times_as_fast?.median;
    if (["base", "ours", "bytes", "agreement", "weights", "part", "text"].includes(key)) return row[key];
    return row.record[key];
  };
  const text = (row, key) => { const found = value(row, key); return found === undefined || found === null ? "not known" : String(found); };
  for (const row of rows) row.group = JSON.stringify([row.text, ...["model", "device", "backend", "batch", "threads"].map(key => row.record[key])]);
  for (const row of rows) row.at = Object.fromEntries([...columns.filter(Boolean), "kind", "weights"].map(key => [key, value(row, key)]));

  // filters
  for (const select of filters) {
    const known = [...new Set(rows.map(row => text(row, select.dataset.key)))].sort(collator.compare);
    for (const name of known) select.append(new Option(name, name));
    select.closest("label").hidden = known.length < 2;
    select.addEventListener("change", () => { shown = PAGE; apply(); });
  }
  const chosen = () => filters.filter(s => s.value).map(s => [s.dataset.key, s.value]);
  $("filters").addEventListener("submit", event => event.preventDefault());
  $("reset").addEventListener("click", () => { for (const s of filters) s.value = ""; shown = PAGE; apply(); });

  // order
  for (const cell of table.tHead.rows[0].cells) {
    if (!cell.dataset.key) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = cell.textContent;
    cell.replaceChildren(button);
    button.addEventListener("click", () => {
      const same = sort.key === cell.dataset.key;
      sort = { key: cell.dataset.key, descending: same && !sort.descending };
      apply(pending);
    });
  }
  const order = (a, b) => {
    const x = a.at[sort.key], y = b.at[sort.key], none = [x, y].map(v => v === undefined || v === null);
    if (none[0] || none[1]) return none[0] - none[1]; // what is not known stands last in both directions
    const by = NUMBERS.has(sort.key) ? x - y : collator.compare(x, y);
    return sort.descending ? -by : by;
  };

  const apply = (all = true) => {
    const wanted = chosen();
    visible = rows.filter(row => wanted.every(([key, name]) => text(row, key) === name));
    if (sort.key) visible.sort(order);
    for (const cell of table.tHead.rows[0].cells) {
      if (cell.dataset.key === sort.key && sort.key) cell.setAttribute("aria-sort", sort.descending ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    }
    show();
    if (!$("record").open) remember();
    draw(all);
  };
  const remember = (id = "") => { // the address brings whoever follows it to what is shown
    const kept = id ? "r-" + id : new URLSearchParams(chosen()).toString();
    history.replaceState(null, "", kept ? "#" + kept : location.pathname + location.search);
  };
  const show = () => {
    body.replaceChildren(...visible.slice(0, shown).map(row => row.element));
    $("count").textContent = `${visible.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} records`;
    $("more").hidden = visible.length <= shown;
  };
  $("more").addEventListener("click", () => { shown += PAGE; show(); });

  // a record
  const open = id => {
    const row = byId.get(id);
    if (!row) return;
    $("record-title").textContent = `${row.record.head}, ${row.record.model}`;
    $("record-file").textContent = `${row.file}, ${row.record.kind === "predicted" ? "a prediction" : "measured"}, run ${row.record.run}`;
    $("record-command").textContent = row.record.command ?? row.record.source ?? "not known";
    $("record-json").textContent = JSON.stringify(row.record, null, 2);
    if (!$("record").open) $("record").showModal();
    remember(id);
  };
  const fromAddress = () => {
    const hash = location.hash.slice(1);
    if (hash.startsWith("r-")) return open(hash.slice(2));
    const wanted = new URLSearchParams(hash);
    for (const select of filters) {
      select.value = wanted.get(select.dataset.key) ?? "";
      if (select.selectedIndex < 0) select.value = ""; // a name that no record has: all
    }
    shown = PAGE;
  };
  $("record").addEventListener("close", () => remember());
  window.addEventListener("hashchange", () => { fromAddress(); apply(); });
  body.addEventListener("click", event => {
    const link = event.target.closest("a[href^='#r-']");
    if (link) { event.preventDefault(); open(link.getAttribute("href").slice(3)); }
  });

  // copy
  const cellText = cell => cell.querySelector("details") ? cell.querySelector("code").textContent : [...cell.childNodes].map(n => n.nodeName === "SMALL" ? `(${n.textContent.trim()})` : n.textContent.trim()).join(" ");
  const markdown = () => {
    const line = cells => "| " + cells.map(c => c.trim().replace(/\s+/g, " ").replace(/[\\|<>`*_[\]]/g, "\\$&")).join(" | ") + " |";
    const heads = [...table.tHead.rows[0].cells].map(c => c.textContent);
    return [line(heads), "|" + heads.map(() => "---|").join(""), ...visible.map(row => line([...row.element.cells].map(cellText)))].join("\n") + "\n";
  };
  $("copy").addEventListener("click", async () => {
    const whole = markdown();
    let done = false;
    try { await navigator.clipboard.writeText(whole); done = true; } catch { // a page from a file may not have the clipboard
      const area = document.createElement("textarea");
      area.value = whole;
      document.body.append(area);
      area.select();
      done = document.execCommand("copy");
      area.remove();
      $("copy").focus();
    }
    $("copied").textContent = done ? `${visible.length.toLocaleString("en")} rows copied` : "the browser does not let this page copy";
  });

  // plots
  const plain = s => String(s).replace(/[\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, "\ufffd").replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;"); // plotly reads tags in its texts
  const cut = (s, most) => s.length > most ? s.slice(0, most - 1) + "…" : s;
  const theme = () => {
    const style = getComputedStyle(document.documentElement), of = name => style.getPropertyValue(name).trim();
    return { ink: of("--ink"), soft: of("--soft"), line: of("--line"), card: of("--card"), colours: [0, 1, 2, 3, 4, 5, 6, 7].map(i => of("--c" + i)) };
  };
  const layout = (t, more) => ({
    paper_bgcolor: t.card, plot_bgcolor: t.card, font: { color: t.ink, size: 13, family: "system-ui, sans-serif" }, dragmode: false, showlegend: false,
    margin: { l: 56, r: 16, t: 10, b: 48 }, hoverlabel: { align: "left" }, ...more,
  });
  const axis = (t, more) => ({ gridcolor: t.line, zerolinecolor: t.line, linecolor: t.line, fixedrange: true, ...more });
  const CONFIG = { displayModeBar: false, responsive: true, doubleClick: false };
  const MEASURES = {
    microseconds: "microseconds of a step", tokens_per_second: "tokens a second", times_as_fast: "times as fast as the baseline",
    bytes_per_step: "bytes that the head reads a step", first_token_seconds: "seconds to the first token", joules_per_token: "joules a token",
  };
  const figure = (record, name) => {
    const found = record?.[name];
    return found === undefined || found === null ? null : typeof found === "number" ? { median: found } : found;
  };
  const listen = (id, ids) => {
    const place = $(id);
    place.ids = ids;
    if (!place.listening) place.on("plotly_click", e => open(place.ids[e.points[0].customdata]));
    place.listening = true;
  };
  const PARTS = { head: "head alone", step: "whole step", text: "whole texts" };
  const about = row => [row.record.model, PARTS[row.record.part], row.record.head, row.record.batch && `batch ${row.record.batch}`, row.record.precision, row.record.backend,
    row.record.threads && `${row.record.threads} thread${row.record.threads > 1 ? "s" : ""}`, row.text,
    row.record.target_agreement && `target ${+(100 * row.record.target_agreement).toPrecision(6)} %`, row.record.device].filter(Boolean).join(", ");

  let asked = false; // until somebody chooses a figure, it is the one that most of what is shown has
  const commonest = () => Object.keys(MEASURES).filter(name => name !== "times_as_fast")
    .map(name => [visible.filter(row => row.record[name] !== undefined).length, name]).reduce((a, b) => b[0] > a[0] ? b : a)[1];
  const drawBars = t => {
    if (!asked) $("measure").value = commonest();
    const name = $("measure").value, able = visible.filter(row => figure(row.record, name)), some = able.slice(0, BARS);
    const n = some.length, at = some.map((_, i) => n - 1 - i), narrow = document.documentElement.clientWidth < 600;
    const trace = (pick, colour, shift, label) => {
      const found = some.map(pick);
      return {
        type: "bar", orientation: "h", y: at.map(y => y + shift), x: found.map(f => f?.median ?? null), width: 0.27, customdata: some.map((_, i) => i),
        marker: { color: colour, pattern: { shape: some.map(row => row.record.kind === "predicted" ? "/" : ""), solidity: 0.3, bgcolor: t.card } },
        error_x: {
          type: "data", symmetric: false, // not a number: no whisker, where zero would be a spread of nothing
          color: t.ink, thickness: 1.3, width: 3,
          array: found.map(f => f?.high == null ? NaN : f.high - f.median), arrayminus: found.map(f => f?.low == null ? NaN : f.median - f.low),
        },
        hovertext: some.map((row, i) => plain(`${label === "base" ? "baseline: " + row.record.baseline?.head : row.record.head}: ${found[i]?.median.toLocaleString("en")}`)),
        hoverinfo: "text",
      };
    };
    const traces = [trace(row => figure(row.record, name), t.colours[0], -0.17, "ours")];
    if (name !== "times_as_fast") traces.unshift(trace(row => figure(row.record.baseline, name), t.soft, 0.1, "base"));
    traces.push({ // names as a trace: as annotations they take plotly twice the time
      type: "scatter", mode: "text", x: some.map(() => 0), y: at.map(y => y + 0.37), textposition: "middle right", hoverinfo: "skip", cliponaxis: false,
      text: some.map(row => plain(cut(about(row), narrow ? 52 : 130))), textfont: { size: narrow ? 10.5 : 12, color: t.ink },
    });
    const ends = some.flatMap(row => [row.record, row.record.baseline]).map(r => figure(r, name)).map(f => f?.high ?? f?.median ?? 0);
    $("bars").hidden = false; // plotly measures what it draws into
    Plotly.react("bars", traces, layout(t, {
      height: Math.max(160, 58 * n + 60), barmode: "overlay", margin: { l: 8, r: 16, t: 6, b: 48 },
      xaxis: axis(t, { title: { text: MEASURES[name], font: { color: t.soft, size: 12 } }, range: [0, 1.04 * Math.max(...ends, 1e-9)] }),
      yaxis: axis(t, { range: [-0.6, Math.max(n, 1) - 0.4], showticklabels: false, showgrid: false, zeroline: false }),
      shapes: name === "times_as_fast" ? [{ type: "line", x0: 1, x1: 1, y0: 0, y1: 1, yref: "paper", line: { color: t.soft, dash: "dash", width: 1.5 } }] : [],
    }), CONFIG);
    $("bars").hidden = n === 0;
    listen("bars", some.map(row => row.id));
    $("bars-note").textContent = n < able.length ? `The first ${n} of ${able.length.toLocaleString("en")} that have this figure, in the table's order.`
      : n ? "" : "None of the records shown has this figure.";
  };

  const MISSES = [0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 0.0005, 0.0002, 0.0001, 0.00005, 0.00002];
  const SHARES = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50];
  const drawFrontier = (t, id, title, pick, ones) => {
    const points = visible.map(row => ({ row, x: pick(row), miss: row.agreement == null ? null : Math.max(1 - row.agreement, FLOOR) }))
      .filter(p => p.x > 0 && p.miss !== null);
    const groups = new Map(); // heads are compared where all but the head is the same
    for (const p of points) {
      const key = p.row.group;
      if (p.row.record.kind !== "predicted") groups.has(key) ? groups.get(key).push(p) : groups.set(key, [p]);
    }
    const lines = [...groups.values()].map(group => {
      const best = [];
      for (const p of group.sort((a, b) => a.x - b.x || a.miss - b.miss)) if (!best.length || p.miss < best.at(-1).miss) best.push(p);
      return best;
    }).filter(best => best.length > 1);
    const drawn = lines.slice(0, LINES), best = drawn.flat();
    const kept = points.length > MARKS ? [...new Set([...best, ...points.slice(0, MARKS)])] : points;
    const heads = [...new Set(kept.map(p => p.row.record.head))];
    const traces = heads.map((head, i) => {
      const own = kept.filter(p => p.row.record.head === head), colour = t.colours[head.startsWith("FlashHead") ? 0 : 1 + i % 7];
      return {
        type: "scatter", mode: "markers", name: plain(cut(head, 40)), x: own.map(p => p.x), y: own.map(p => p.miss), customdata: own.map(p => kept.indexOf(p)),
        marker: {
          color: colour, size: 10, line: { width: 1.5, color: colour },
          symbol: own.map(p => p.row.record.kind === "predicted" || p.row.record.top1_agreement === undefined ? "circle-open" : "circle"),
        },
        hovertext: own.map(p => plain(`${about(p.row)}: ${+(100 * p.row.agreement).toFixed(3)} % at ${+p.x.toPrecision(3)}`)), hoverinfo: "text",
      };
    });
    const broken = pick => drawn.flatMap(line => [...line.map(pick), null]); // one trace: a null between two lines
    traces.push({ type: "scatter", mode: "lines", x: broken(p => p.x), y: broken(p => p.miss), line: { color: t.soft, dash: "dot", width: 1.5 }, hoverinfo: "skip",
      showlegend: false });
    const low = points.length ? Math.min(...points.map(p => p.miss)) : 1e-3, high = points.length ? Math.max(...points.map(p => p.miss)) : 0.1;
    $(id).hidden = false;
    Plotly.react(id, traces, layout(t, {
      height: 400, showlegend: true, legend: { orientation: "h", y: -0.2, font: { size: 12 } }, margin: { l: 74, r: 16, t: 10, b: 48 },
      xaxis: axis(t, { type: "log", title: { text: title, font: { color: t.soft, size: 12 } }, tickvals: SHARES, ticktext: SHARES.map(v => ones ? String(v) : `${+(100 * v).toPrecision(3)} %`) }),
      yaxis: axis(t, {
        type: "log", range: [Math.log10(high * 1.6), Math.log10(low / 1.6)], tickvals: MISSES,
        ticktext: MISSES.map(m => m <= FLOOR ? "100 %" : `${+(100 * (1 - m)).toFixed(4)} %`),
      }),
      shapes: ones ? [{ type: "line", x0: 1, x1: 1, y0: 0, y1: 1, yref: "paper", line: { color: t.soft, dash: "dash", width: 1.5 } }] : [],
    }), CONFIG);
    $(id).hidden = kept.length === 0;
    listen(id, kept.map(p => p.row.id));
    const without = visible.length - points.length, few = kept.length < points.length ? ` Marks: the lines' and the first ${MARKS} of ${points.length.toLocaleString("en")}.` : "";
    const more = lines.length > LINES ? ` Lines of the first ${LINES} of ${lines.length.toLocaleString("en")} groups: filter for others.` : "";
    $(id + "-note").textContent = (without ? `${without.toLocaleString("en")} of the records shown lack one of the two figures.` : "") + few + more;
  };
  // One plot a frame, the bars first: none keeps the page from answering for long. An order alone changes no frontier.
  const FRONTIERS = [
    t => drawFrontier(t, "by-bytes", "bytes of a step, of the dense head’s", row => row.bytes, false),
    t => drawFrontier(t, "by-time", "time, of the baseline’s", row => { const f = row.record.times_as_fast?.median; return f ? 1 / f : null; }, true),
  ];
  let drawing = 0;
  const draw = (all = true) => {
    cancelAnimationFrame(drawing);
    const t = theme(), left = [drawBars, ...(all ? FRONTIERS : [])];
    pending = all;
    delete document.documentElement.dataset.drawn;
    const next = () => {
      left.shift()(t);
      if (left.length) drawing = requestAnimationFrame(next);
      else { pending = false; document.documentElement.dataset.drawn = String(performance.now()); }
    };
    drawing = requestAnimationFrame(next);
  };
  $("measure").addEventListener("change", () => { asked = true; draw(pending); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());

  for (const element of document.querySelectorAll(".scripted")) element.hidden = false;
  fromAddress();
  apply();
})();

// Search and filters of the list. The list stands in the page and works without this script.
"use strict";
(function () {
  const index = JSON.parse(document.getElementById("index").textContent);
  const form = document.getElementById("filters");
  const list = document.getElementById("papers");
  const count = document.getElementById("count");
  const items = new Map(Array.from(list.children, (item) => [item.dataset.slug, item]));
  const first = Array.from(items.keys()); // the order of the page
  const field = (id) => document.getElementById(id);
  const stop = new Set(index.stop);
  const mean = index.lengths.reduce((sum, length) => sum + length, 0) / Math.max(index.lengths.length, 1);
  const meaning = window.everytokenMeaning || {};
  const K1 = 1.2, B = 0.6, RANK = 8, WEIGHT = 0.75;

  function stem(word) {
    for (const ending of index.endings)
      if (word.endsWith(ending) && word.length - ending.length >= 3) return word.slice(0, word.length - ending.length);
    return word;
  }

  function stems(text) {
    return (text.toLowerCase().match(/[a-z0-9*]+/g) || []).filter((word) => !stop.has(word)).map(stem);
  }

  function ranked(scores) {
    const places = Array.from(scores.keys()).filter((place) => scores[place] > 0);
    return places.sort((a, b) => scores[b] - scores[a] || a - b);
  }

  // BM25 over stems, as catalog/search.py does it
  function byWords(query) {
    const scores = index.slugs.map(() => 0);
    for (const word of new Set(stems(query))) {
      const counts = index.words.map((text) => {
        let partial = 0;
        if (word.length >= 3)
          for (const other in text) if (other !== word && other.startsWith(word)) partial += text[other];
        return (Object.hasOwn(text, word) ? text[word] : 0) + 0.5 * partial;
      });
      const matching = counts.filter((number) => number > 0).length;
      const rarity = Math.log(1 + (counts.length - matching + 0.5) / (matching + 0.5));
      counts.forEach((number, place) => {
        if (number)
          scores[place] += rarity * number * (K1 + 1) / (number + K1 * (1 - B + B * index.lengths[place] / mean));
      });
    }
    const whole = query.trim().toLowerCase();
    index.exact.forEach((texts, place) => { if (whole && texts.includes(whole)) scores[place] += 100; });
    return { ranking: ranked(scores), scores };
  }

  // likenesses of the query's words to papers, added up
  function byMeaning(query) {
    const scores = index.slugs.map(() => 0);
    for (const word of new Set(query.toLowerCase().match(/[a-z]+/g) || [])) {
      if (!Object.hasOwn(meaning, word)) continue;
      for (const pair of meaning[word].split(" ")) {
        const [place, likeness] = pair.split(":").map((part) => parseInt(part, 36));
        scores[place] += likeness;
      }
    }
    return ranked(scores);
  }

  // both rankings merged by reciprocal rank; an exact name comes first
  function search(query) {
    const { ranking, scores } = byWords(query);
    const merged = index.slugs.map(() => 0);
    ranking.forEach((place, rank) => { merged[place] += 1 / (RANK + rank); });
    byMeaning(query).forEach((place, rank) => { merged[place] += WEIGHT / (RANK + rank); });
    ranking.forEach((place) => { if (scores[place] >= 100) merged[place] += 1; });
    return ranked(merged).map((place) => index.slugs[place]);
  }

  function show(found) {
    const wanted = { station: "station", year: "year", state: "status", verdict: "verdict" };
    let slugs = found === null ? first.slice() : found.filter((slug) => items.has(slug));
    const order = field("order").value;
    const date = (slug) => items.get(slug).dataset.date;
    if (order === "date") slugs.sort((a, b) => (date(a) < date(b) ? 1 : date(a) > date(b) ? -1 : 0));
    if (order === "measured") {
      const rank = (slug) => ["measured", "implemented", "planned"].indexOf(items.get(slug).dataset.status);
      slugs.sort((a, b) => rank(a) - rank(b));
    }
    slugs = slugs.filter((slug) => Object.entries(wanted).every(([id, name]) => {
      const value = field(id).value, has = items.get(slug).dataset[name];
      return !value || value === has || (id === "state" && value === "implemented" && has === "measured");
    }));
    const visible = new Set(slugs);
    for (const slug of first) items.get(slug).hidden = !visible.has(slug);
    for (const slug of slugs) list.append(items.get(slug));
    count.textContent = slugs.length + (slugs.length === 1 ? " paper" : " papers");
    document.body.dataset.shown = slugs.join(" "); // what is shown, in order
  }

  let asked = 0; // answers of a server may overtake each other

  async function update() {
    const query = field("query").value;
    const turn = ++asked;
    if (!query.trim()) { show(null); return; }
    show(search(query));
    if (!form.dataset.search) return;
    try {
      const answer = await fetch(form.dataset.search + "?q=" + encodeURIComponent(query));
      if (!answer.ok) return;
      const found = (await answer.json()).slugs;
      if (turn === asked) show(found);
    } catch (error) { /* the server is gone: what the page found itself stays */ }
  }

  form.hidden = false;
  for (const button of form.querySelectorAll(".noscript")) button.hidden = true;
  form.addEventListener("submit", (event) => { event.preventDefault(); update(); });
  form.addEventListener("reset", () => setTimeout(update));
  form.addEventListener("input", update);
  field("query").addEventListener("keydown", (event) => {
    if (event.key === "Escape") { field("query").value = ""; update(); }
  });
  const given = new URLSearchParams(location.search).get("q");
  if (given) field("query").value = given;
  if (field("query").value) update();
})();

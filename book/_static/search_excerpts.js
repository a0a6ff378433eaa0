// Under each result of a search: the text around the words that were asked for. A result that would
// lead to the top of a page leads to where they are.
(() => {
  const asked = (new URLSearchParams(location.search).get("q") ?? "").toLowerCase().trim();
  const words = asked.split(/[^\p{L}\p{N}_]+/u).filter((word) => word.length > 1);

  // Where a word is: as it was asked for, at the beginning of another, or inside. The index knows
  // stems, so a word that is not there as it was written may be there shortened.
  const places = (text, word) => {
    for (let length = word.length; length >= Math.max(3, word.length - 4); length--) {
      const stem = word.slice(0, length);
      for (const [before, after] of [["(?<![\\p{L}\\p{N}_])", "(?![\\p{L}\\p{N}_])"],
                                     ["(?<![\\p{L}\\p{N}_])", ""], ["", ""]]) {
        const found = [...text.matchAll(new RegExp(before + stem + after, "gu"))];
        if (found.length) return found.map((hit) => ({ at: hit.index, length, word }));
      }
    }
    return [];
  };

  // The place in a text with the most of the words close together, and what it is worth.
  const best = (text) => {
    const lower = text.toLowerCase();
    const hits = words.flatMap((word) => places(lower, word)).sort((a, b) => a.at - b.at);
    let found = { worth: 0, at: 0, hits };
    hits.forEach(({ at }, i) => {
      const near = new Set();
      for (let k = i; k < hits.length && hits[k].at < at + 200; k++) near.add(hits[k].word);
      const worth = near.size + (lower.startsWith(asked, at) ? 1 : 0);
      if (worth > found.worth) found = { worth, at, hits };
    });
    return found;
  };

  const excerpt = (text, { at, hits }) => {
    const begin = Math.max(0, text.lastIndexOf(" ", Math.max(0, at - 90)));
    const end = text.indexOf(" ", at + 150) < 0 ? text.length : text.indexOf(" ", at + 150);
    const paragraph = document.createElement("p");
    paragraph.className = "context";
    let from = begin;
    if (begin) paragraph.append("…");
    for (const { at: start, length } of hits) {
      if (start < from || start >= end) continue;
      const mark = document.createElement("mark");
      mark.textContent = text.slice(start, start + length);
      paragraph.append(text.slice(from, start), mark);
      from = start + length;
    }
    paragraph.append(text.slice(from, end), end < text.length ? " …" : "");
    return paragraph;
  };

  const results = new MutationObserver((changes) => {
    for (const item of changes.flatMap((change) => [...change.addedNodes])) {
      const link = item.nodeName === "LI" && item.querySelector("a");
      const page = link && window.searchTexts[link.getAttribute("href").split(".html")[0]];
      if (!page) continue;
      const there = page.filter(([place]) => place === link.hash.slice(1));
      const known = (link.hash && there.length ? there : page).map(([place, text]) => (
        { place, text, ...best(text) }));
      const found = known.reduce((a, b) => (b.worth > a.worth ? b : a));
      if (!link.hash && found.place) {
        link.setAttribute("href", `${link.getAttribute("href")}#${found.place}`);
      }
      item.append(excerpt(found.text, found));
    }
  });
  document.addEventListener("DOMContentLoaded", () => {
    const list = document.getElementById("search-results");
    results.observe(list, { childList: true, subtree: true });
  });
})();

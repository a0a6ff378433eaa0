// Under each result of a search: the text around the words that were asked for.
(() => {
  const asked = (new URLSearchParams(location.search).get("q") ?? "").toLowerCase();
  const words = asked.split(/[^\p{L}\p{N}_]+/u).filter((word) => word.length > 1);
  // the index knows stems: a word that is not there as it was written may be there shortened
  const find = (text, word) => {
    for (let length = word.length; length >= Math.max(3, word.length - 4); length--) {
      const at = text.indexOf(word.slice(0, length));
      if (at >= 0) return [at, length];
    }
    return text.indexOf(word) < 0 ? null : [text.indexOf(word), word.length];
  };
  const excerpt = (text) => {
    const lower = text.toLowerCase();
    const hits = words.map((word) => find(lower, word)).filter((hit) => hit);
    const [at] = hits.length ? hits.reduce((a, b) => (b[0] < a[0] ? b : a)) : [0];
    const begin = Math.max(0, text.lastIndexOf(" ", Math.max(0, at - 90)));
    const end = text.indexOf(" ", at + 150) < 0 ? text.length : text.indexOf(" ", at + 150);
    const paragraph = document.createElement("p");
    paragraph.className = "context";
    let from = begin;
    if (begin) paragraph.append("…");
    const marks = hits.filter(([start]) => start >= begin && start < end).sort((a, b) => a[0] - b[0]);
    for (const [start, length] of marks) {
      if (start < from) continue;
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
      const text = link && window.searchTexts[link.getAttribute("href").split(".html")[0]];
      if (text) item.append(excerpt(text));
    }
  });
  document.addEventListener("DOMContentLoaded", () => {
    const list = document.getElementById("search-results");
    results.observe(list, { childList: true, subtree: true });
  });
})();

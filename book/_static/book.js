// What the pages need of JavaScript beyond the theme's: formulas and tables that scroll can
// be reached with the keyboard, buttons say what they show, and paper is white.
(() => {
  const page = document.documentElement;
  const all = (selector) => [...document.querySelectorAll(selector)];

  if (window.MathJax?.loader) {
    // this part of MathJax sets an option of its menu, which is not here, and MathJax would complain
    window.MathJax.loader["a11y/assistive-mml"] = {
      ready: () => delete window.MathJax.config.options.menuOptions,
    };
  }

  // What scrolls by itself where it is wider than the page, and what it is called.
  const scrollers = {
    ".bd-article mjx-container[display='true']": "formula",
    ".bd-article span.math.wide": "formula",
    ".pst-scrollable-table-container, .bd-article .output.text_html": "table",
    ".bd-article pre": "code or output",
  };

  // Where a formula may break at the end of a line: a short one nowhere; others at signs and commas
  // outside of brackets, and inside of them only if it is too long otherwise. What is too long even
  // so must scroll.
  const ways = ["whole", "open", "", "wide"];
  const short = (column) => Math.min(0.6 * column.width, 280);
  const markBreaks = (formula) => {
    let depth = 0;
    for (const part of formula.querySelectorAll("mjx-math :is(mjx-mo, mjx-break)")) {
      if (part.matches("mjx-break")) {
        const [before, after] = [part.previousElementSibling, part.nextElementSibling]
          .map((sign) => sign?.matches("mjx-mo") ? sign.textContent : "");
        part.classList.toggle("weak", depth > 0 || !(before === "," || /\p{Sm}/u.test(after)));
      } else if (/^[([{⟨⌈⌊]$/.test(part.textContent)) depth++;
      else if (/^[)\]}⟩⌉⌋]$/.test(part.textContent)) depth--;
    }
  };
  const breakFormulas = () => {
    let left = all(".bd-article span.math").flatMap((formula) => {
      const box = formula.closest("p, li, dd, figcaption, h1, h2, h3, h4");
      const shown = box?.offsetParent && !formula.closest("table");
      return shown ? [[formula, box.getBoundingClientRect()]] : [];
    });
    for (const way of ways) {
      for (const [formula] of left) {
        formula.classList.remove(...ways.filter(Boolean));
        if (way) formula.classList.add(way);
      }
      left = left.filter(([formula, column]) => way === "whole"
        ? formula.getBoundingClientRect().width > short(column)
        : [...formula.querySelectorAll("mjx-math, mjx-math *")].some(
          (part) => part.getBoundingClientRect().right > column.right + 1));
    }
  };

  const measure = () => {
    breakFormulas();
    for (const [selector, name] of Object.entries(scrollers)) {
      const found = all(selector).map((box) => [box, box.scrollWidth > box.clientWidth + 1]);
      for (const [box, scrolls] of found) {
        if (scrolls) {
          box.tabIndex = 0;
          box.setAttribute("role", "group");
          box.setAttribute("aria-label", `${name}, wider than the page; it scrolls sideways`);
        } else if (box.hasAttribute("aria-label")) {
          for (const attribute of ["tabindex", "role", "aria-label"]) box.removeAttribute(attribute);
        }
      }
    }
    page.dataset.measured = "";
  };
  let waiting = 0;
  const soon = () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(measure);
  };
  addEventListener("load", async () => {
    // the button in the title of a solution is named after it
    for (const button of all("button.toggle-button")) {
      button.setAttribute("aria-label", button.closest(".admonition-title").textContent.trim());
    }
    // a notebook is to be kept, not to be read in a tab
    for (const link of all("a.btn-download-source-button")) link.download = "";
    for (const picture of all("img[loading=lazy]")) picture.loading = "eager";
    await window.MathJax?.startup?.promise;
    await document.fonts.ready;
    await Promise.allSettled(all("img").map((picture) => picture.decode()));
    all(".bd-article span.math").forEach(markBreaks);
    measure();
    // formulas and pictures have moved what the address leads to; who has scrolled meanwhile stays
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!scrolled) target?.scrollIntoView({ behavior: "instant" });
  });
  let scrolled = false;
  for (const way of ["wheel", "touchmove", "keydown", "mousedown"]) {
    addEventListener(way, () => { scrolled = true; }, { once: true, passive: true });
  }
  addEventListener("resize", soon);
  document.addEventListener("toggle", soon, true);
  // a solution that opens is wider, or narrower, once its button has turned
  document.addEventListener("click", (event) => {
    if (event.target.closest(".toggle .admonition-title")) setTimeout(soon, 350);
  });

  // On paper everything is light, whatever the screen is.
  let theme = page.dataset.theme;
  addEventListener("beforeprint", () => {
    theme = page.dataset.theme;
    page.dataset.theme = "light";
  });
  addEventListener("afterprint", () => { page.dataset.theme = theme; });
})();

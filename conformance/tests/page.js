// Measures each frame when all of them are there, and leaves what it saw as attributes of the body.
addEventListener("load", () => document.querySelectorAll("iframe").forEach((frame, n) => {
  const page = frame.contentDocument, root = page.documentElement;
  const tell = (what, value) => document.body.setAttribute("data-" + what + "-" + n, value);
  // What scrolls by itself may hold what is wider; nothing else may stick out.
  const inScroller = (e) => e.parentElement && (
    ["auto", "scroll", "hidden"].includes(getComputedStyle(e.parentElement).overflowX)
      || inScroller(e.parentElement));
  const wide = [...page.querySelectorAll("body *")]
    .filter((e) => !(e instanceof frame.contentWindow.SVGElement) || e.tagName === "svg")
    .filter((e) => e.getBoundingClientRect().right > root.clientWidth + 1 && !inScroller(e))
    .map((e) => e.tagName + "." + e.className);
  if (root.scrollWidth > root.clientWidth) wide.push("the page itself: " + root.scrollWidth);
  tell("wide", wide.slice(0, 5).join(" "));
  tell("width", root.clientWidth);
  tell("scripts", page.querySelectorAll("script, [onerror], [onload], img").length);
  const brokers = [...page.querySelectorAll(".row.head span")].slice(2).map((e) => e.textContent);
  tell("cells", [...page.querySelectorAll(".cell[data-law]")]
    .map((e) => [e.dataset.law, brokers.indexOf(e.dataset.broker), e.dataset.result].join("/")).join(" "));
}));

const frame = document.getElementById("f");
frame.addEventListener("load", () => {
  const page = frame.contentDocument, root = page.documentElement, body = document.body;
  // What scrolls by itself may hold what is wider; nothing else may stick out.
  const inScroller = (e) => e.parentElement && (
    ["auto", "scroll", "hidden"].includes(getComputedStyle(e.parentElement).overflowX)
      ? true : inScroller(e.parentElement));
  const wide = [...page.querySelectorAll("body *")]
    .filter((e) => !(e instanceof frame.contentWindow.SVGElement) || e.tagName === "svg")
    .filter((e) => e.getBoundingClientRect().right > root.clientWidth + 1 && !inScroller(e))
    .map((e) => e.tagName + "." + e.className);
  if (root.scrollWidth > root.clientWidth) wide.push("the page itself: " + root.scrollWidth);
  body.setAttribute("data-wide", wide.slice(0, 5).join(" "));
  body.setAttribute("data-width", root.clientWidth);
  body.setAttribute("data-scripts", page.querySelectorAll("script, [onerror], [onload], img").length);
  const brokers = [...page.querySelectorAll(".row.head span")].slice(2).map((e) => e.textContent);
  body.setAttribute("data-cells", [...page.querySelectorAll(".cell[data-law]")]
    .map((e) => [e.dataset.law, brokers.indexOf(e.dataset.broker), e.dataset.result].join("/")).join(" "));
});

// Renders what pymdownx.arithmatex marks, with the KaTeX that lies beside this file.
document.addEventListener("DOMContentLoaded", () => {
  for (const element of document.querySelectorAll(".arithmatex")) {
    const marked = element.textContent.trim();
    katex.render(marked.slice(2, -2), element, { displayMode: marked.startsWith("\\["), throwOnError: false });
  }
});

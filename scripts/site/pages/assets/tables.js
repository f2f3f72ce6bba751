// Gives each cell the name of its column. On a narrow screen, site.css shows a row of a table with texts as a block.
// Marks options such as --resume in a line of text, so that site.css keeps them in one line.
"use strict";
const LONG = 24; // characters; a table whose cells are all shorter stays a grid
for (const table of document.querySelectorAll(".md-typeset table:not([class])")) {
  const heads = [...table.querySelectorAll("thead th")].map((head) => head.textContent);
  const cells = [...table.querySelectorAll("tbody td")];
  for (const cell of cells) cell.dataset.head = heads[cell.cellIndex];
  table.dataset.layout = cells.some((cell) => cell.textContent.length > LONG) ? "texts" : "grid";
}
const OPTION = /(?<![\w-])--?[a-z][\w-]*/g;
for (const code of document.querySelectorAll(".md-typeset :not(pre) > code")) {
  code.innerHTML = code.innerHTML.replace(OPTION, '<span class="option">$&</span>');
}

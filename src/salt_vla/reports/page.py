"""The look of a report: one style sheet for light and dark, telephone to wide screen, and for paper."""

from __future__ import annotations

# The page may show what it carries and nothing else: no script, no request.
CONTENT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

# --card is the paper colour of the charts (reports/canvas.py).
STYLE = """
:root {
 color-scheme: light dark;
 --page: #f7f7f5; --card: #ffffff; --ink: #24272c; --quiet: #636870; --rule: #e0e2e6;
 --accent: #0b66a8; --good: #0b6b4f; --bad: #a8400d;
}
@media (prefers-color-scheme: dark) {
 :root {
  --page: #141518; --card: #1c1e22; --ink: #e6e7e9; --quiet: #9a9fa7; --rule: #34373d;
  --accent: #5cb3ee; --good: #4cc79e; --bad: #f0954f;
 }
}
* { box-sizing: border-box; }
html {
 font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
 -webkit-text-size-adjust: 100%;
}
body { margin: 0; background: var(--page); color: var(--ink); }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.55rem; line-height: 1.2; letter-spacing: -.01em; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 0 0 .75rem; }
h3 { font-size: .95rem; margin: 0 0 .4rem; }
h1, h2, h3, nav a { overflow-wrap: anywhere; }
p { margin: 0 0 .9rem; max-width: 46rem; overflow-wrap: anywhere; }
a { color: var(--accent); text-underline-offset: .15em; }
.lead { color: var(--quiet); margin-bottom: 1.4rem; }
.verdict { font-size: 1.2rem; line-height: 1.42; max-width: 52rem; }
.findings { margin: 0 0 1.2rem; padding-left: 1.1rem; max-width: 58rem; line-height: 1.5; }
.findings li { margin-bottom: .25rem; overflow-wrap: anywhere; }
.findings li::marker { color: var(--quiet); }
.note, figcaption { color: var(--quiet); font-size: .85rem; line-height: 1.45; overflow-wrap: anywhere; }
.note { margin-top: -.5rem; max-width: 58rem; }
section + section, nav + section {
 border-top: 1px solid var(--rule); margin-top: 2.25rem; padding-top: 1.75rem; scroll-margin-top: 1rem;
}
nav { border-top: 1px solid var(--rule); margin-top: 2rem; padding-top: 1rem; font-size: .9rem; }
nav h2 { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
nav ol { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: .35rem 1.25rem; }
nav a { color: var(--quiet); text-decoration: none; }
nav a:hover, nav a:focus-visible { color: var(--accent); text-decoration: underline; }
.table, .picture, pre { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; }
.table { overflow-x: auto; margin: 0 0 1rem; }
table {
 border-collapse: separate; border-spacing: 0; width: 100%;
 font-size: .9rem; font-variant-numeric: tabular-nums;
}
caption { text-align: left; font-weight: 600; padding: .75rem .9rem .5rem; }
caption span { display: inline-block; position: sticky; left: .9rem; max-width: min(100vw - 4.5rem, 57rem); }
th, td {
 padding: .4rem .9rem; text-align: right; white-space: nowrap; vertical-align: top;
 border-top: 1px solid var(--rule);
}
thead th { border-top: 0; color: var(--quiet); font-weight: 500; font-size: .85rem; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--card); }
tbody th { font-weight: 500; }
.unit, .interval { color: var(--quiet); font-weight: 400; font-size: .82em; }
.interval { display: inline-block; margin-left: .35em; }
.best .figure { font-weight: 700; }
.ahead .figure { color: var(--good); font-weight: 600; }
.behind .figure { color: var(--bad); font-weight: 600; }
.level .figure { color: var(--quiet); }
.checks th, .checks td { text-align: left; }
.checks td:last-child { white-space: normal; min-width: 18rem; }
.checks .ok { color: var(--good); }
.checks .warn, .checks .bad { color: var(--bad); }
.checks .bad { font-weight: 700; }
figure { margin: 0 0 1.5rem; min-width: 0; }
figure:not(.wide) { max-width: 36rem; }
.picture { padding: .75rem; margin-bottom: .5rem; overflow-x: auto; }
.picture img { display: block; width: 100%; height: auto; }
.wide .picture img { min-width: 40rem; }
figcaption { max-width: 46rem; }
.figures {
 display: grid; gap: 0 1.25rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr));
}
.facts { margin: 0 0 1.25rem; }
.facts dl {
 margin: 0; display: grid; gap: 0 1.75rem; font-size: .9rem;
 grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr));
}
.facts dl div {
 display: flex; gap: 1rem; justify-content: space-between;
 border-bottom: 1px solid var(--rule); padding: .3rem 0;
}
dt { color: var(--quiet); }
dd { margin: 0; text-align: right; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
details { margin: 0 0 .75rem; font-size: .9rem; }
summary { cursor: pointer; color: var(--quiet); }
pre {
 overflow: auto; max-height: 30rem; padding: .8rem;
 font: .8rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
}
.code { white-space: pre-wrap; overflow-wrap: anywhere; max-height: none; }
footer {
 border-top: 1px solid var(--rule); margin-top: 2.25rem; padding-top: 1rem;
 color: var(--quiet); font-size: .85rem;
}
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
@media (max-width: 66rem) { .interval { display: block; margin-left: 0; } }
@media (max-width: 48rem) {
 main { padding: 1.25rem 1rem 3rem; }
 th, td { padding: .4rem .6rem; }
 .verdict { font-size: 1.08rem; }
 tbody th { white-space: normal; min-width: 6.5rem; }
}
@media (min-width: 90rem) {
 main {
  max-width: 84rem; display: grid; grid-template-columns: 12.5rem minmax(0, 1fr); column-gap: 3rem;
 }
 main > * { grid-column: 2; }
 nav {
  grid-column: 1; grid-row: 1 / span 100; border: 0; margin: 0; padding: .4rem 0 0;
  position: sticky; top: 2rem; align-self: start;
 }
 nav ol { flex-direction: column; }
}
@media print {
 html { font-size: 12px; }
 nav, details { display: none; }
 .table, .picture { break-inside: avoid; border-color: #ccc; }
}
"""

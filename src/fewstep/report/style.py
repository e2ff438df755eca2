"""The style sheet of a report: light and dark, wide and narrow, screen and paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, "Source Serif 4", Charter, Georgia, serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  --paper: #fcfbf8; --panel: #f4f2ec; --ink: #1f1f1d; --faint: #68665f; --line: #dfdbd1; --link: #0b5c9a;
  --s0: #c2410c; --s1: #1d6fb8; --s2: #15803d; --s3: #7c3aed; --s4: #b03a7b; --s5: #8a6a00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16171a; --panel: #1f2125; --ink: #e9e7e1; --faint: #a3a19a; --line: #3a3c41; --link: #7ab8ee;
    --s0: #fb8b4b; --s1: #66aef2; --s2: #56c97f; --s3: #a993f7; --s4: #ec8fc0; --s5: #dcbd55;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 1.06rem/1.58 var(--serif); font-variant-numeric: lining-nums; text-rendering: optimizeLegibility;
}
main { max-width: 60rem; margin: 0 auto; padding: 3.2rem 1.4rem 4rem; }
p, ul.notes, .lede { max-width: 43rem; }
h1 { font-size: clamp(1.75rem, 1.2rem + 2.4vw, 2.7rem); line-height: 1.15; letter-spacing: -.015em; margin: 0 0 1rem;
  text-wrap: balance; }
h2 { font-size: 1.4rem; line-height: 1.25; margin: 3.4rem 0 .6rem; letter-spacing: -.005em; }
h3 { font-size: 1.08rem; margin: 2.1rem 0 .4rem; }
.kicker, figcaption, th, td, .tile, .labels, .caption, .legend, .course, footer, summary {
  font-family: var(--sans); }
.kicker { color: var(--faint); font-size: .82rem; margin: 0 0 .7rem; }
.lede { font-size: 1.2rem; line-height: 1.5; margin: 0 0 1.8rem; }
a { color: var(--link); text-decoration-thickness: 1px; text-underline-offset: .15em; }
.faint { color: var(--faint); }
.swatch { display: inline-block; width: .62em; height: .62em; border-radius: 50%; margin-right: .45em; }

.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(12.5rem, 1fr)); gap: .9rem; margin: 1.6rem 0 0; }
.tile { background: var(--panel); border-radius: 8px; padding: .95rem 1.05rem 1rem; font-size: .84rem; line-height: 1.4;
  color: var(--faint); }
.tile b { display: block; color: var(--ink); font-size: 1.65rem; line-height: 1.2; font-weight: 650;
  margin-bottom: .25rem; letter-spacing: -.01em; font-variant-numeric: tabular-nums; }

.labels { display: grid; grid-template-columns: repeat(var(--columns), 1fr); font-size: .68rem; line-height: 1.15;
  color: var(--faint); text-align: center; align-items: end; }
.sheets { --label: 10.5rem; }
.sheets .head { position: sticky; top: 0; background: var(--paper); padding: .5rem 0 .35rem; z-index: 1; }
.sheet, .sheets .head { display: grid; grid-template-columns: var(--label) minmax(0, 1fr); column-gap: 1.1rem; }
.sheet { margin: 0 0 1.05rem; align-items: center; break-inside: avoid; }
.sheet img { display: block; width: 100%; height: auto; }
.caption { font-size: .82rem; line-height: 1.4; color: var(--faint); }
.caption b { display: block; color: var(--ink); font-size: .95rem; }
.sheets h3 { margin: 1.5rem 0 .55rem; padding-top: .8rem; border-top: 1px solid var(--line); }
.sheets h3:first-of-type { border-top: 0; padding-top: 0; margin-top: .4rem; }

.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 1rem 1.6rem; }
figure { margin: 0; max-width: 36rem; break-inside: avoid; }
figure svg, .course svg { display: block; width: 100%; height: auto; overflow: visible; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .86rem; margin: .6rem 0 1rem; padding: 0;
  list-style: none; }

.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .87rem; line-height: 1.35;
  font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 600; color: var(--faint); vertical-align: bottom; }
td { text-align: right; white-space: nowrap; }
th, td { padding: .42rem .7rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.rule td { border-bottom: 2px solid var(--line); }
tr.best td { font-weight: 650; }
td small { color: var(--faint); font-weight: 400; }

.courses { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17.5rem), 1fr));
  gap: 1.1rem 1.4rem; }
.course { font-size: .82rem; line-height: 1.4; color: var(--faint); break-inside: avoid; }
.course b { color: var(--ink); font-weight: 600; }
.course .name { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1rem; margin-bottom: .2rem;
  font-variant-numeric: tabular-nums; }
.course p { margin: .15rem 0 0; }
ul.notes { padding-left: 1rem; margin: .35rem 0 0; } ul.notes li { margin-bottom: .25rem; }
pre { font: .84rem/1.5 var(--mono); background: var(--panel); border-radius: 8px; padding: .9rem 1.05rem;
  overflow-x: auto; }
code { font-family: var(--mono); font-size: .86em; }
dl { max-width: 43rem; } dt { font-weight: 600; margin-top: .7rem; } dd { margin: .1rem 0 0; }
details { margin: 1rem 0; } summary { cursor: pointer; font-size: .92rem; color: var(--link); }
footer { margin-top: 3.5rem; padding-top: 1rem; border-top: 1px solid var(--line); font-size: .82rem;
  color: var(--faint); }

@media screen and (max-width: 44rem) {
  body { font-size: 1rem; } main { padding: 1.8rem 1rem 3rem; } .lede { font-size: 1.1rem; }
  .tiles { grid-template-columns: 1fr 1fr; gap: .6rem; } .tile { padding: .75rem .8rem; } .tile b { font-size: 1.3rem; }
  .sheet, .sheets .head { grid-template-columns: minmax(0, 1fr); row-gap: .3rem; }
  .sheets .head > :first-child { display: none; }
  .caption b { display: inline; margin-right: .5em; }
  .labels span { writing-mode: vertical-rl; transform: rotate(180deg); justify-self: center; font-size: .7rem; }
  table { font-size: .8rem; } th, td { padding: .4rem .3rem; } th:last-child, td:last-child { padding-right: 0; }
  td small { display: block; } th.roomy, td.roomy { display: none; }
}
@media print {
  :root { --paper: #fff; --panel: #f5f5f5; --ink: #000; --faint: #444; --line: #bbb; --link: #000;
    --s0: #c2410c; --s1: #1d6fb8; --s2: #15803d; --s3: #7c3aed; --s4: #b03a7b; --s5: #8a6a00; }
  body { font-size: 10pt; } main { padding: 0; max-width: none; } .sheets .head { position: static; }
  .tiles { grid-template-columns: repeat(4, 1fr); } .plots { grid-template-columns: 1fr 1fr; }
  h2, h3 { break-after: avoid; } pre { white-space: pre-wrap; } tr { break-inside: avoid; }
}
"""

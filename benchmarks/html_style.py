"""The style sheet of the HTML report."""

STYLE = """
:root {
  color-scheme: light;
  --ink: #1b2330; --soft: #5b6675; --line: #e3e7ee; --ours: #0b7a5d; --eager: #b4532a; --peer: #8a94a6; --bad: #b3261e;
}
* { box-sizing: border-box; }
body {
  margin: 0; background: #f6f7f9; color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 26px; margin: 8px 0 4px; }
h2 { font-size: 20px; margin: 40px 0 12px; }
h3 { font-size: 16px; margin: 0 0 4px; }
h4 { font-size: 13px; margin: 14px 0 6px; color: var(--soft); font-weight: 600; }
p { margin: 4px 0 10px; }
.soft, .none { color: var(--soft); font-size: 13px; }
.card { background: white; border: 1px solid var(--line); border-radius: 10px; padding: 16px; margin: 14px 0; }
.scroll { overflow-x: auto; }

table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 9px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
td.left, th.left { text-align: left; }
.wide td:first-child { white-space: normal; min-width: 15em; }
tr.perfvl td { color: var(--ours); font-weight: 600; }
tr.bound td, tr.missing td { color: var(--soft); }
tr.wrong td { color: var(--bad); }
.win { color: var(--ours); font-weight: 600; }
.loss { color: var(--bad); font-weight: 600; }

.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 0 28px; }
.bar {
  display: grid; grid-template-columns: 12em 1fr 6em; gap: 8px; align-items: center;
  margin: 3px 0; font-size: 13px;
}
.who { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.amount { font-variant-numeric: tabular-nums; }
.track { background: #f0f2f5; border-radius: 3px; height: 14px; overflow: hidden; }
.fill { display: block; height: 100%; min-width: 2px; background: var(--peer); border-radius: 3px; }
.perfvl .fill { background: var(--ours); }
.perfvl .who { font-weight: 600; color: var(--ours); }
.eager .fill { background: var(--eager); }
.bound .fill { background: repeating-linear-gradient(90deg, #c9cfd9 0 5px, #e3e7ee 5px 9px); }
.wrong .fill { background: repeating-linear-gradient(45deg, var(--bad) 0 3px, #f6d5d2 3px 7px); }
.wrong .amount b { color: var(--bad); }

details { margin-top: 12px; }
summary { cursor: pointer; color: var(--soft); font-size: 13px; }
svg { width: 100%; height: auto; display: block; }
.tall { display: none; }
ol.numbers { columns: 2; font-size: 13px; padding-left: 22px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; font-size: 13px; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }

@media (max-width: 720px) {
  main { padding: 12px 10px 48px; }
  h1 { font-size: 22px; }
  .card { padding: 12px; }
  .pair { grid-template-columns: 1fr; }
  .bar { grid-template-columns: 1fr 5.5em; gap: 0 8px; margin: 7px 0; }
  .who { grid-column: 1 / 3; }
  .wide thead { display: none; }
  .wide tr { display: block; padding: 8px 0; border-bottom: 1px solid var(--line); }
  .wide td, .wide td.left { display: flex; justify-content: space-between; border: 0; padding: 1px 0; }
  .wide td:first-child { font-weight: 600; }
  .wide td:not(:first-child)::before { content: attr(data-label); color: var(--soft); font-weight: 400; }
  .desktop { display: none; }
  .tall { display: block; }
  ol.numbers { columns: 1; }
}
"""

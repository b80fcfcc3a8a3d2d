"""How the report page looks, and the readout under the pointer: the only style and the only script in it."""

STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#1c2430;--soft:#667085;--edge:#e3e7ee;
--grid:#eef0f4;--loss:#2f6bea;--val:#e8780c;--lr:#8450d8;--grad:#0e9aa7;--rate:#1f9d57;--memory:#0e8fb8;
--compute:#9db8ea;--communication:#ef7d72;--snapshot:#a98be8;--data:#f2bd42;--regroup:#3b82d0;
--restore:#2fae77;--good:#1a8f4c;--bad:#d3312f;--warn:#b86e00;
--going:#2f6bea}@media(prefers-color-scheme:dark){:root{--page:#0f1319;--card:#171d26;
--ink:#e6eaf1;--soft:#93a0b4;--edge:#29313d;--grid:#222a35;--loss:#6d9dff;--val:#ff9f45;--lr:#b28cff;
--grad:#3fc5d0;--rate:#4dcb86;--memory:#48bfe6;--compute:#3f5f9c;--communication:#d9665c;--snapshot:#8668d0;
--data:#d3a02c;--regroup:#4f9be8;--restore:#3fbf86;--good:#4dcb86;--bad:#ff6b66;
--warn:#f0aa3c;--going:#6d9dff}}*{box-sizing:border-box}body{
margin:0 auto;padding:24px 20px 60px;max-width:1180px;background:var(--page);color:var(--ink);
font:14px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif}h1{font-size:26px;line-height:1.2;
margin:0;overflow-wrap:anywhere}h2{font-size:16px;margin:0 0 8px}.when{color:var(--soft);margin:4px 0 14px}
.status{font-size:13px;font-weight:600;padding:3px 11px;border-radius:99px;vertical-align:4px;
margin-left:6px;border:1px solid currentColor}.good{color:var(--good)}.bad{color:var(--bad)}.warn{
color:var(--warn)}.going{color:var(--going)}.verdict{margin:0 0 10px;padding:12px 16px;border-radius:8px;
background:var(--card);border:1px solid var(--edge);border-left:5px solid currentColor;font-size:16px;
font-weight:600;overflow-wrap:anywhere}.verdict small{display:block;font-size:12px;font-weight:400;
color:var(--soft)}dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(140px,1fr));gap:1px;
margin:0 0 14px;background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:8px 6px}
dl div{padding:7px 12px}.wide{grid-column:span 2}dt{color:var(--soft);font-size:12px}dd{margin:0;
font-size:17px;font-weight:600;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}.wide dd{
font-size:15px;line-height:28px}.note,.empty{margin:0 0 10px;padding:8px 14px;border:1px dashed var(--edge);
border-radius:8px;color:var(--soft)}.empty{padding:40px;text-align:center}main,section,details{
background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:14px 18px;margin:0 0 14px}
input[name=axis]{position:absolute;opacity:0}label{display:inline-block;padding:2px 14px;
border:1px solid var(--edge);cursor:pointer;color:var(--soft)}label[for=by-time]{border-radius:7px 0 0 7px}
label[for=by-step]{border-radius:0 7px 7px 0;border-left:0}input:checked+label{background:var(--grid);
color:var(--ink);font-weight:600}input:focus-visible+label{outline:2px solid var(--going)}
#by-time:checked~.charts .step,#by-step:checked~.charts .time{display:none}.charts{position:relative}figure{
margin:12px 0 4px}figcaption{display:flex;flex-wrap:wrap;gap:2px 14px;align-items:baseline;
margin-bottom:6px}figcaption small{color:var(--soft);margin-left:-8px}.said{margin-left:auto;
color:var(--soft);font-size:12px}.said em{font-style:normal}.key{color:var(--soft);font-size:12px;
white-space:nowrap}.key::before{content:"";display:inline-block;width:12px;height:10px;border-radius:3px;
background:var(--tone);margin-right:5px;vertical-align:-1px}.key.tone-total::before{height:2px;
vertical-align:3px}svg.chart{display:block;overflow:visible;margin-left:84px;width:calc(100% - 104px)}
svg.plot,svg.mark,svg.icon{overflow:visible}svg.icon{width:10px;height:10px;margin-right:9px;
transform:translate(5px,4px)}text{fill:var(--soft);font-size:11px;font-variant-numeric:tabular-nums}.y{
text-anchor:end}.x{text-anchor:middle}.grid{stroke:var(--grid)}.line{fill:none;stroke:var(--tone);
stroke-width:1.6;stroke-linejoin:round;stroke-linecap:round;vector-effect:non-scaling-stroke}.dots{
fill:none;stroke:var(--tone);stroke-width:5.5;stroke-linecap:round;vector-effect:non-scaling-stroke}.stale{
opacity:.45}.area{fill:var(--tone)}.hole{stroke:var(--bad);stroke-width:1.5;fill:none;
vector-effect:non-scaling-stroke}.line.tone-total{stroke-width:1}.rule{stroke-dasharray:3 3;
stroke:var(--kind);opacity:.75}.shape{fill:var(--kind);stroke:var(--card);stroke-width:.7}.tone-loss{
--tone:var(--loss)}.tone-val{--tone:var(--val)}.tone-lr{--tone:var(--lr)}.tone-grad{--tone:var(--grad)}
.tone-rate{--tone:var(--rate)}.tone-memory{--tone:var(--memory)}.tone-compute{--tone:var(--compute)}
.tone-communication{--tone:var(--communication)}.tone-snapshot{--tone:var(--snapshot)}.tone-data{
--tone:var(--data)}.tone-detect{--tone:var(--communication)}.tone-decide{--tone:var(--data)}.tone-fence{
--tone:var(--snapshot)}.tone-regroup{--tone:var(--regroup)}.tone-restore{--tone:var(--restore)}
.tone-catch_up{--tone:var(--compute)}.tone-total{--tone:var(--soft)}.kind-fault{--kind:var(--bad)}
.kind-verdict{--kind:var(--val)}.kind-remedy{--kind:var(--lr)}
.kind-restored,.kind-run_finished,.kind-run_started{
--kind:var(--good)}.kind-formed{--kind:var(--loss)}.kind-checkpoint{--kind:var(--memory)}
.kind-snapshot,.kind-other{--kind:var(--soft)}.kind-resized{--kind:var(--lr)}.kind-preempted{
--kind:var(--warn)}.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%}th{text-align:left;
color:var(--soft);font-weight:500;font-size:12px}td,th{padding:5px 14px 5px 0;
border-top:1px solid var(--grid);vertical-align:top}tr:first-child th{border:0}td:nth-child(-n+3){
white-space:nowrap;font-variant-numeric:tabular-nums}td:last-child{overflow-wrap:anywhere;min-width:220px}
.keys{margin:0 0 4px;display:flex;flex-wrap:wrap;gap:2px 14px}table.bars{margin:0 0 14px}.bars td{border:0;
padding:2px 14px 2px 0}.bars td:nth-child(2){width:100%}.bars td:last-child{min-width:0;white-space:nowrap;
color:var(--soft)}.recoveries td,.campaign td{white-space:nowrap;font-variant-numeric:tabular-nums}
.recoveries td:last-child,.campaign td:last-child{white-space:normal;min-width:320px}.sums td{
font-weight:600}summary{cursor:pointer;font-weight:600}pre{overflow-x:auto;
font:12.5px/1.5 ui-monospace,Menlo,Consolas,monospace}#cross{position:absolute;top:0;bottom:0;width:1px;
background:var(--soft);pointer-events:none;display:none}#box{position:fixed;display:none;
pointer-events:none;background:var(--card);border:1px solid var(--edge);border-radius:8px;padding:8px 12px;
font-size:12px;box-shadow:0 4px 18px #0003;font-variant-numeric:tabular-nums}#box div{display:flex;
justify-content:space-between;gap:18px}#box span{color:var(--soft)}@media(max-width:640px){body{
padding:14px 10px 40px}main,section,details{padding:10px}svg.chart{margin-left:66px;width:calc(100% - 82px)}
.said{margin-left:0;width:100%}}
"""

SCRIPT = """
(() => {
  const charts = document.querySelector('.charts'), cross = document.getElementById('cross');
  const box = document.getElementById('box');
  const data = JSON.parse(document.getElementById('readout').textContent);
  if (!charts || !data.rows.length) return;
  const hide = () => { cross.style.display = box.style.display = 'none'; };
  const row = (name, value) => {
    const line = document.createElement('div'), label = document.createElement('span');
    label.textContent = name;
    line.append(label, value);
    return line;
  };
  charts.addEventListener('pointerleave', hide);
  charts.addEventListener('pointermove', (event) => {
    const svg = [...charts.querySelectorAll('svg.chart')].find((s) => s.getBoundingClientRect().width > 0);
    const area = svg.getBoundingClientRect(), column = svg.classList.contains('time') ? 0 : 1;
    const part = (event.clientX - area.left) / area.width;
    if (part < -0.01 || part > 1.01) return hide();
    const lo = +svg.dataset.lo, hi = +svg.dataset.hi, x = lo + part * (hi - lo);
    let best = data.rows[0];
    for (const r of data.rows) if (Math.abs(r[column] - x) <= Math.abs(best[column] - x)) best = r;
    const place = area.left + (best[column] - lo) / (hi - lo) * area.width;
    cross.style.left = (place - charts.getBoundingClientRect().left) + 'px';
    cross.style.display = box.style.display = 'block';
    const minutes = Math.floor(best[0] / 60), seconds = best[0] - 60 * minutes;
    const hours = Math.floor(minutes / 60), said = minutes ? seconds.toFixed(0) : seconds.toFixed(1);
    const clock = (hours ? `${hours} h ` : '') + (minutes ? `${minutes % 60} min ` : '') + `${said} s`;
    box.replaceChildren(row('step', best[1].toLocaleString('en')), row('time', clock), ...data.names.flatMap(
      (name, i) => best[i + 2] === null ? [] : [row(name, String(best[i + 2]))]));
    box.style.left = Math.min(event.clientX + 18, innerWidth - box.offsetWidth - 8) + 'px';
    box.style.top = Math.min(event.clientY + 14, innerHeight - box.offsetHeight - 8) + 'px';
  });
})();
"""

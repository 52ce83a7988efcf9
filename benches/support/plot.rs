//! A bar chart as SVG, for light and dark backgrounds.

use std::fmt::Write;

pub(crate) struct Bar {
    pub(crate) label: String,
    pub(crate) value: f64,
    /// The text after the bar.
    pub(crate) note: String,
    pub(crate) ours: bool,
}

pub(crate) fn of(bars: &[Bar]) -> String {
    const ROW: usize = 26;
    const LEFT: usize = 330;
    const WIDTH: f64 = 380.0;
    let height = bars.len() * ROW + 40;
    let longest = bars.iter().fold(1.0, |longest, bar| bar.value.max(longest));
    let mut svg = String::new();
    write!(
        svg,
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 {height}" role="img" aria-labelledby="title">
<title id="title">Nanoseconds and allocations of a call beyond the bare one</title>
<style>
text {{ font: 13px system-ui, sans-serif; fill: #24292f }}
.ours {{ fill: #0969da }}
.theirs {{ fill: #8c959f }}
@media (prefers-color-scheme: dark) {{
text {{ fill: #e6edf3 }}
.ours {{ fill: #58a6ff }}
.theirs {{ fill: #6e7681 }}
}}
</style>
<text x="{LEFT}" y="18">beyond the bare call, first try (shorter is better)</text>
"#
    )
    .unwrap();
    for (at, bar) in bars.iter().enumerate() {
        let y = at * ROW + 32;
        let width = (bar.value.max(0.0) / longest * WIDTH).max(1.0);
        let class = if bar.ours { "ours" } else { "theirs" };
        let (label, note) = (escape(&bar.label), escape(&bar.note));
        writeln!(
            svg,
            r#"<text x="{}" y="{}" text-anchor="end">{label}</text><rect class="{class}" x="{LEFT}" y="{y}" width="{width:.1}" height="18" rx="2"/><text x="{:.1}" y="{}">{note}</text>"#,
            LEFT - 8,
            y + 14,
            LEFT as f64 + width + 8.0,
            y + 14
        )
        .unwrap();
    }
    svg.push_str("</svg>\n");
    svg
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

//! Reads the pages of the manual.

use std::fs;
use std::path::Path;

/// The text of a page.
pub fn text(page: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("src/manual")
        .join(page);
    fs::read_to_string(path).unwrap()
}

/// The SQL blocks of a section of a page.
pub fn sql_of(page: &str, section: &str) -> Vec<String> {
    let text = text(page);
    let (_, rest) = text.split_once(&format!("\n## {section}\n")).unwrap();
    let blocks = rest
        .split("\n## ")
        .next()
        .unwrap()
        .split("```sql\n")
        .skip(1);
    blocks
        .map(|block| block.split("```").next().unwrap().to_owned())
        .collect()
}

//! What a page shows of a text, and in how many bytes.

use super::*;

#[test]
fn nothing_that_others_wrote_is_markup() {
    let hostile = r#"{"<script>alert(1)</script>": "\"'><img src=x onerror=alert(1)>&amp;"}"#;
    for html in [
        Html::json(hostile),
        Html::line(hostile),
        Html::lines(hostile),
        Html::diff(hostile, "{}").0,
        beginning(hostile).0,
    ] {
        let html = html.to_string();
        assert!(
            !html.contains("<script") && !html.contains("<img"),
            "{html}"
        );
        assert!(html.contains("&lt;script&gt;"), "{html}");
    }
}

#[test]
fn deceptive_characters_are_visible_wherever_they_stand() {
    let text = "a\u{202e}b";
    let json = format!(r#"{{"{text}": "{text}"}}"#);
    let shown = "a<mark>\\u{202E}</mark>b";
    for (html, times) in [
        (Html::line(text), 1),
        (Html::lines(text), 1),
        (Html::json(&json), 2),
        (Html::json(r#"{"x": "a\u202eb"}"#), 1),
        (Html::diff(&json, "{}").0, 2),
    ] {
        let html = html.to_string();
        assert_eq!(html.matches(shown).count(), times, "{html}");
        assert!(!html.contains('\u{202e}'));
    }
}

#[test]
fn json_is_shown_as_it_was_written_a_member_on_each_line() {
    let json = r#" {"b":[1.0,-0,12345678901234567890123,true ,{}],"a" : "x\ty\u00e9", "c":[ ] } "#;
    assert_eq!(
        pretty(json, "  "),
        "{\n  \"b\": [\n    1.0,\n    -0,\n    12345678901234567890123,\n    true,\n    {}\n  ],\n  \
         \"a\": \"x\\ty\u{e9}\",\n  \"c\": []\n}"
    );
    for scalar in ["\"a\"", "1e9", "null"] {
        assert_eq!(pretty(scalar, "  "), scalar);
    }
    assert_eq!(
        compact(json),
        r#"{"b":[1.0,-0,12345678901234567890123,true,{}],"a":"x\ty\u00e9","c":[]}"#
    );
    let (shown, is_whole) = beginning(" [ 1, 2 ] ");
    assert_eq!((shown.to_string().as_str(), is_whole), ("[1,2]", true));
    let value: serde_json::Value = serde_json::from_str(json).unwrap();
    let again: serde_json::Value = serde_json::from_str(&pretty(json, "\t")).unwrap();
    assert_eq!(value, again);
}

#[test]
fn what_is_edited_has_no_deceptive_characters_and_means_the_same() {
    let json = "{\"a\u{202e}\":[\"b\u{200b}\\n\",\"\u{e9}\"]}";
    let text = editable(json, 1000).unwrap();
    assert_eq!(
        text,
        "{\n  \"a\\u202e\": [\n    \"b\\u200b\\n\",\n    \"\u{e9}\"\n  ]\n}"
    );
    let [one, other] =
        [json, &text].map(|json| serde_json::from_str::<serde_json::Value>(json).unwrap());
    assert_eq!(one, other);
}

/// Payloads of 200 KB that take the most markup, or the most space.
fn heavy() -> Vec<String> {
    let array = |element: &str, depth: usize| {
        let elements = vec![element; 200_000 / (element.len() + 1)].join(",");
        format!("{}{elements}{}", "[".repeat(depth), "]".repeat(depth))
    };
    vec![
        array("1", 1),
        array("1", 100),
        array("\"\"", 100),
        array("1,\"\"", 100),
        array("[]", 100),
        array("[1]", 100),
        array("{\"\":1}", 100),
        array("\"\u{7f}\"", 100),
        array(&format!("\"{}\"", "\u{7f}".repeat(190_000)), 1),
        array(&format!("\"{}\"", "\u{7f}a".repeat(95_000)), 1),
        array(&format!("\"{}\"", "\\\"'".repeat(60_000)), 1),
    ]
}

#[test]
fn a_small_payload_does_not_make_a_huge_page() {
    for json in heavy() {
        let html = Html::json(&json).to_string();
        assert!(
            html.len() < 13 * json.len(),
            "{} {}",
            html.len(),
            &json[..120]
        );
        let (changes, _) = Html::diff(&json, &json.replace(['1', '\u{7f}'], "2"));
        let len = changes.to_string().len();
        assert!(
            len < LONGEST_DIFF + 11 * json.len(),
            "{len} {}",
            &json[..120]
        );
    }
}

/// What a browser shows of HTML without blocks.
fn shown(html: &Html) -> String {
    let html = html.to_string();
    let mut text = String::new();
    for part in html.split('<') {
        text.push_str(part.split_once('>').map_or(part, |(_, text)| text));
    }
    text.replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&amp;", "&")
}

#[test]
fn nothing_of_a_payload_is_lost_in_its_markup() {
    let json = r#"{"<b>":[1,2.50,null,[3,"&amp;",{}],-1e9,"x",true],"":{"a\"b":false,"c":[[]]}}"#;
    assert_eq!(shown(&Html::json(json)), pretty(json, "\t"));
    let elements = Html::json("[1,2,[3,4],{},5]").to_string();
    assert_eq!(
        elements,
        "[\n\t<b>1,\n\t2</b>,\n\t[\n\t\t<b>3,\n\t\t4</b>\n\t],\n\t{},\n\t<b>5</b>\n]"
    );
    for json in heavy().iter().filter(|json| json.contains('1')) {
        assert_eq!(shown(&Html::json(json)), pretty(json, "\t"));
    }
    let marks = Html::line("a\u{200b}\u{200b}b\u{7f}").to_string();
    assert_eq!(
        marks,
        "a<mark>\\u{200B}\\u{200B}</mark>b<mark>\\u{7F}</mark>"
    );
}

#[test]
fn a_payload_that_no_form_holds_is_not_edited() {
    let json = format!("[{}1]", "1,".repeat(1000));
    let text = editable(&json, 100_000).unwrap();
    assert!(fits_form(&text, 100_000));
    assert_eq!(editable(&json, text.len()), None);
    assert_eq!(editable(&json, text.len() - 1), None);
}

#[test]
fn a_text_that_is_no_json_is_shown_whole() {
    for text in ["", "\"open", "{", "]]", "{\"a\"", "\"a\\", "nul: l", "é"] {
        let shown: String = pretty(text, "  ").split_whitespace().collect();
        let whole: String = text.split_whitespace().collect();
        assert_eq!(shown, whole);
        Html::json(text);
    }
}

#[test]
fn long_texts_are_folded_and_whole() {
    let long = "word ".repeat(40_000);
    let html = Html::json(&format!("{{\"text\": \"{long}\"}}")).to_string();
    assert!(html.contains("<details") && html.contains("200000 characters, 1 line<"));
    assert!(html.contains(&long));
    let short = Html::json(r#"{"text": "two\nlines"}"#).to_string();
    assert!(!short.contains("<details") && short.contains("two\nlines"));
}

#[test]
fn a_diff_shows_what_was_taken_and_what_was_added() {
    let (html, is_whole) = Html::diff(r#"{"to":"a","amount":1}"#, r#"{"to":"a","amount":2}"#);
    assert_eq!(
        html.to_string(),
        "  {\n  \t\"to\": \"a\",\n<del>- \t\"amount\": 1\n</del><ins>+ \t\"amount\": 2\n</ins>  }\n"
    );
    assert!(is_whole);
    assert_eq!(Html::diff("{}", "{ }"), (Html::default(), true));
}

#[test]
fn a_diff_says_when_there_is_more_of_it() {
    let [old, new] = ["1", "2"].map(|element| format!("[{}]", vec![element; 90_000].join(",")));
    let (html, is_whole) = Html::diff(&old, &new);
    assert!(!is_whole);
    let html = html.to_string();
    assert!(html.len() < LONGEST_DIFF + 100 && html.ends_with("</del>"));
}

/// A value of an attribute would end at a quote.
#[test]
fn no_page_has_this_html_in_an_attribute() {
    let sources = [
        include_str!("../action.rs"),
        include_str!("../decide.rs"),
        include_str!("../list.rs"),
        include_str!("../page.rs"),
        include_str!("../sign_in.rs"),
    ];
    let fields: Vec<&str> = sources
        .iter()
        .flat_map(|source| source.lines())
        .filter_map(|line| line.trim().trim_end_matches(',').split_once(": "))
        .filter(|(_, of)| ["Html", "Option<Html>", "Option<Diff>"].contains(of))
        .map(|(name, _)| name.rsplit(' ').next().unwrap_or(name))
        .collect();
    assert!(fields.contains(&"payload") && fields.contains(&"title"));
    let pages = [
        include_str!("../pages/action.html"),
        include_str!("../pages/again.html"),
        include_str!("../pages/base.html"),
        include_str!("../pages/decided.html"),
        include_str!("../pages/error.html"),
        include_str!("../pages/list.html"),
        include_str!("../pages/sign_in.html"),
        include_str!("../pages/tenants.html"),
    ];
    let mut values = 0;
    for tag in pages.iter().flat_map(|page| page.split('<').skip(1)) {
        let tag = tag.split_once('>').map_or(tag, |(tag, _)| tag);
        for value in tag.split("{{ ").skip(1) {
            let value = value.split_once(" }}").map_or(value, |(value, _)| value);
            let name = value.rsplit('.').next().unwrap_or(value);
            assert!(!fields.contains(&name), "{value}");
            values += 1;
        }
    }
    assert!(values > 20, "{values}");
}

#[test]
fn ages_are_in_their_largest_unit() {
    let at = SystemTime::UNIX_EPOCH;
    for (seconds, shown) in [
        (0, "0 s"),
        (59, "59 s"),
        (60, "1 min"),
        (7_199, "1 h"),
        (200_000, "2 days"),
    ] {
        let later = at + Duration::from_secs(seconds);
        assert_eq!(age(at, later), format!("{shown} ago"));
        assert_eq!(until(later, at), format!("in {shown}"));
    }
    assert_eq!(age(at + Duration::from_secs(5), at), "0 s ago");
    assert_eq!(until(at, at + Duration::from_secs(5)), "now");
}

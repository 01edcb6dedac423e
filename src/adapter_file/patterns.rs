//! Patterns of a LoraConfig, such as those of `alpha_pattern`, which come from files: matched in linear time.

use regex::Regex;

use crate::error::{CatError, Result};

/// How much of a pattern an error shows.
const SHOWN: usize = 60;

/// Which names a pattern fits: as for PEFT, a regular expression for the end of a name, from a dot on or the whole.
pub fn names_that_fit(pattern: &str, names: &[String]) -> Result<Vec<bool>> {
    let regex = Regex::new(&format!(r"^(?:.*\.)?(?:{pattern})$")).map_err(|error| {
        let shown: String = pattern.chars().take(SHOWN).collect();
        let reason = error.to_string();
        let reason = reason.lines().last().unwrap_or_default().trim_start_matches("error: ");
        let expected = "a regular expression without look-around and back references";
        CatError::adapter("load_lora", format!("a pattern must be {expected}, got {shown:?}: {reason}"))
    })?;
    Ok(names.iter().map(|name| regex.is_match(name)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_fit_ends_of_names_as_in_peft() {
        let names = ["mid.to_q", "mid.xto_q", "to_q", "to_q.a", "mid.attn.10.to_q"].map(String::from);
        for (pattern, fits) in [
            ("to_q", [true, false, true, false, true]),
            (r"mid\.to_q", [true, false, false, false, false]),
            ("^to_q", [false, false, true, false, false]),
            (r"attn\.\d+\.to_(q|k)", [false, false, false, false, true]),
            ("to_q|nothing", [true, false, true, false, true]),
            (".*", [true; 5]),
        ] {
            assert_eq!(names_that_fit(pattern, &names).unwrap(), fits, "{pattern}");
        }
    }

    #[test]
    fn no_pattern_takes_forever() {
        let names = ["a".repeat(5000) + "b"];
        for pattern in ["(a+)+$", "(.*)*x", "(a|a)*c", ".*.*.*.*z"] {
            assert_eq!(names_that_fit(pattern, &names).unwrap(), [false], "{pattern}");
        }
        for pattern in ["(", "[", "*", "(?P<a>", "((a{1000}){1000}){1000}", r"(a)\1", "(?!a)b", r"\"] {
            let error = names_that_fit(pattern, &names).unwrap_err().to_string();
            assert!(error.contains("must be a regular expression"), "{error}");
        }
    }
}

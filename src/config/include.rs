//! `include`: files that hold more rules. Each is named by its path beside the rules file, or by a pattern for names in one
//! folder; nothing is searched for, and what names no file is an error: rules that are gone without a word are not kept.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use regex::Regex;

use super::code::Code;
use super::diagnostic::Diagnostic;
use super::mistake::Mistake;
use super::{FILE_BYTES_MAX, RulesFile, Spanned, read_file};

/// How many files may be included: far more than anybody divides rules into.
const FILES_MAX: usize = 1000;

/// Files in one folder.
#[derive(Clone, Debug)]
pub(super) struct Pattern {
    /// The folder, beside that of the rules file.
    folder: PathBuf,
    /// What stands behind it.
    name: String,
}

/// Reads one item of `include`: a path, in whose last part `*` stands for anything.
pub(super) fn pattern(text: &str) -> Result<Pattern, Mistake> {
    const HELP: &str = "write:  include = [\"rules.d/*.toml\"]";
    let (folder, name) = text.rsplit_once('/').map_or(("", text), |(folder, name)| (&text[..=folder.len()], name));
    if name.is_empty() {
        return Err(Mistake::whole(Code::UnreadableFile, text, "names no file").help(HELP));
    }
    if folder.contains('*') {
        let mistake = Mistake::whole(Code::UnreadableFile, text, "has `*` in the name of a folder");
        return Err(mistake.label("only in the last part").help("name each folder"));
    }
    Ok(Pattern { folder: folder.into(), name: name.to_owned() })
}

/// The files that the patterns of the rules file name: in the order of the patterns, and by name within each. A file that
/// several of them name is read once, and the rules file is not among them.
pub(super) fn read(main: &RulesFile, patterns: &[Spanned<Pattern>]) -> Result<Vec<RulesFile>, Vec<Diagnostic>> {
    let mut files: Vec<RulesFile> = Vec::new();
    let mut problems = Vec::new();
    let mut bytes_left = FILE_BYTES_MAX.saturating_sub(main.text.len() as u64);
    for Spanned { value: pattern, span } in patterns {
        let unreadable = |title: String| Diagnostic::error(Code::UnreadableFile, title, span.clone(), "");
        let named = match paths(&main.path, pattern) {
            Ok(named) => named,
            Err((path, error)) => {
                problems.push(unreadable(format!("the folder `{}` cannot be read: {error}", path.display())));
                continue;
            }
        };
        if named.is_empty() {
            let none = unreadable("`include` names no file".to_owned());
            problems.push(none.help("write such a file, or leave it out"));
        }
        for path in named {
            if path == main.path || files.iter().any(|file| file.path == path) {
                continue;
            }
            if files.len() == FILES_MAX {
                problems.push(unreadable(format!("`include` names more than {FILES_MAX} files")));
                return Err(problems);
            }
            match read_file(&path, bytes_left) {
                Ok(text) => {
                    bytes_left -= text.len() as u64;
                    files.push(RulesFile { path, text });
                }
                Err(error) => {
                    problems.push(unreadable(format!("the file `{}` cannot be read: {error}", path.display())));
                }
            }
        }
    }
    if problems.is_empty() { Ok(files) } else { Err(problems) }
}

/// The paths that a pattern names; where its folder cannot be read, that and why.
fn paths(main: &Path, Pattern { folder, name }: &Pattern) -> Result<Vec<PathBuf>, (PathBuf, io::Error)> {
    let folder = main.parent().unwrap_or(Path::new("")).join(folder);
    if !name.contains('*') {
        return Ok(vec![folder.join(name)]);
    }
    let pieces: Vec<String> = name.split('*').map(regex::escape).collect();
    let matches = Regex::new(&format!("^(?s:{})$", pieces.join(".*")));
    let matches = matches.map_err(|error| (folder.clone(), io::Error::other(error)))?;
    // An empty path is the folder where keepstep was started.
    let listed = if folder.as_os_str().is_empty() { Path::new(".") } else { &folder };
    let is_wanted = |name: &OsString| {
        let name = name.to_string_lossy();
        !name.starts_with('.') && matches.is_match(&name)
    };
    let names = std::fs::read_dir(listed).and_then(|entries| {
        let names = entries.map(|entry| entry.map(|entry| entry.file_name()));
        // Of too many, so many that it shows, the rules file itself not counted.
        names.filter(|name| name.as_ref().map_or(true, is_wanted)).take(FILES_MAX + 2).collect::<io::Result<Vec<_>>>()
    });
    let mut names = names.map_err(|error| (folder.clone(), error))?;
    names.sort();
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use std::fs;

    use tempfile::TempDir;

    use super::*;
    use crate::config::{Config, Problems, diagnostic, load};

    const SERVERS: &str = "[postgres]\nurl = \"postgresql://db/shop\"\n[redis]\nurl = \"redis://cache\"\n";

    fn rule(name: &str) -> String {
        format!("[rule.{name}]\ntable  = \"public.products\"\ndelete = [\"{name}:{{id}}\"]\n")
    }

    /// A folder with these files.
    fn folder(files: &[(&str, &str)]) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        folder
    }

    fn read(folder: &TempDir) -> Result<Config, Problems> {
        load(&folder.path().join("keepstep.toml"), &|_| None).map(|(config, _)| config)
    }

    /// What is said of the files, without the name of their folder.
    fn said(files: &[(&str, &str)]) -> String {
        let folder = folder(files);
        let Problems { file, diagnostics } = read(&folder).unwrap_err();
        let shown = diagnostic::render(&diagnostics, &file, false);
        shown.replace(&format!("{}/", folder.path().display()), "")
    }

    #[test]
    fn rules_come_in_the_order_of_the_patterns_and_of_the_names() {
        let main = format!("include = [\"z.toml\", \"rules.d/*.toml\", \"*.toml\"]\n{SERVERS}{}", rule("first"));
        let folder = folder(&[
            ("keepstep.toml", &main),
            ("z.toml", &rule("second")),
            ("rules.d/b.toml", &rule("fourth")),
            ("rules.d/a.toml", &format!("# nothing\n\n{}", rule("third"))),
            ("rules.d/.hidden.toml", "not TOML"),
            ("rules.d/c.toml~", "not TOML"),
            ("rules.d/deeper/d.toml", "not TOML"),
        ]);
        let config = read(&folder).unwrap();
        let names: Vec<_> = config.rules.iter().map(|rule| rule.name.value.as_str()).collect();
        assert_eq!(names, ["first", "second", "third", "fourth"]);
        for rule in &config.rules {
            assert_eq!(config.file.text(&rule.name.span), rule.name.value);
        }
    }

    #[test]
    fn the_rules_file_needs_no_rule_of_its_own() {
        let main = format!("include = [\"a.toml\"]\n{SERVERS}");
        assert_eq!(read(&folder(&[("keepstep.toml", &main), ("a.toml", &rule("a"))])).unwrap().rules.len(), 1);
        assert!(said(&[("keepstep.toml", &main), ("a.toml", "")]).contains("has no rule"));
        assert!(
            !said(&[("keepstep.toml", &main)]).contains("has no rule"),
            "it may stand in the one that is not there"
        );
    }

    #[test]
    fn mistakes_are_shown_in_the_file_that_has_them() {
        let main = format!("include = [\"rules.d/*\"]\n{SERVERS}[defaults]\nttl = \"1d\"\n{}", rule("feed"));
        let again = format!("# more\n{}\n{}tble = 1\n", rule("feed"), rule("other"));
        let servers = format!("include = [\"c.toml\"]\nkey = 1\n{SERVERS}[defaults]\n[table]\ntable = \"public.t\"\n");
        let shown = said(&[
            ("keepstep.toml", &main),
            ("rules.d/a.toml", &again),
            ("rules.d/b.toml", &servers),
            ("rules.d/c.toml", &format!("{}changed = \"name\"\n[rule.open\n", rule("third"))),
        ]);
        insta::assert_snapshot!(shown);
    }

    #[test]
    fn what_cannot_be_included_is_said() {
        let cases = ["\"a.toml\"", "[]", "[\"\"]", "[\"rules.d/\"]", "[\"*/a.toml\"]", "[\"none.toml\", \"no*.toml\"]"];
        let shown: Vec<String> = cases
            .iter()
            .map(|include| said(&[("keepstep.toml", &format!("include = {include}\n{SERVERS}{}", rule("a")))]))
            .collect();
        insta::assert_snapshot!(shown.join("\n~~~\n\n"));
    }

    #[test]
    fn there_is_an_end_to_what_is_included() {
        let files: Vec<(String, String)> = (0..=FILES_MAX).map(|at| (format!("d/{at}.toml"), String::new())).collect();
        let main = format!("include = [\"d/*\"]\n{SERVERS}");
        let mut all = vec![("keepstep.toml", main.as_str())];
        all.extend(files.iter().map(|(name, text)| (name.as_str(), text.as_str())));
        assert!(said(&all).contains("names more than 1000 files"));

        let long = "#".repeat(usize::try_from(FILE_BYTES_MAX).unwrap() / 2);
        let shown = said(&[("keepstep.toml", &main), ("d/a", &long), ("d/b", &long)]);
        assert!(shown.contains("the file `d/b` cannot be read: the rules are larger than 16777216 bytes"), "{shown}");
    }
}

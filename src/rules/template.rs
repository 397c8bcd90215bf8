//! Key templates: `product:{id}`, `page:{url|md5}`, `{column?default}`, `{{` and `}}` for braces.

/// A parsed key template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    /// Its text.
    pub text: String,
}

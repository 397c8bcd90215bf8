//! Known-wrong variants, for the tests that must fail on them: a test that passes with one of these proves nothing.
//!
//! Only builds with debug assertions have them, and only where the environment asks.

/// What can be left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Canary {
    /// Visibility is not looked at: what is known as the watermark method.
    MarkerOnly,
    /// The marker is not waited for.
    VisibilityOnly,
    /// Nothing waits for transactions that are older than the slot.
    NoBarrier,
    /// A leaf that was rewritten is read on.
    NoFilenode,
    /// Acknowledgements follow what is applied, not `low`.
    AckPastLow,
}

impl Canary {
    fn name(self) -> &'static str {
        match self {
            Self::MarkerOnly => "marker_only",
            Self::VisibilityOnly => "visibility_only",
            Self::NoBarrier => "no_barrier",
            Self::NoFilenode => "no_filenode",
            Self::AckPastLow => "ack_past_low",
        }
    }
}

/// Whether this build leaves it out.
pub(crate) fn is(canary: Canary) -> bool {
    cfg!(debug_assertions) && std::env::var_os("KEEPSTEP_CANARY").is_some_and(|name| name == canary.name())
}

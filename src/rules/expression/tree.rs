//! An expression as it was written, before it is known what its names are.

use std::ops::Range;

use super::decimal::Decimal;
use super::value::Arithmetic;

/// A part of an expression.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Node {
    pub(super) kind: Kind,
    /// Its bytes in the text.
    pub(super) range: Range<usize>,
    /// Those of its own sign or name: the operator, the column, the function.
    pub(super) mark: Range<usize>,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Kind {
    Null,
    Bool(bool),
    Int(i64),
    /// With a point or an exponent.
    Decimal(Decimal),
    /// With an exponent that no decimal holds.
    Float(f64),
    Text(String),
    Bytes(Vec<u8>),
    List(Vec<Node>),
    Name(String),
    /// `a.b`, and `a["b"]`
    Field(Box<Node>, String),
    /// `has(a.b)`
    Has(Box<Node>, String),
    /// `a[b]`
    Index(Box<Node>, Box<Node>),
    Not(Box<Node>),
    Negate(Box<Node>),
    Binary(Operator, Box<Node>, Box<Node>),
    /// `a ? b : c`
    Choice(Box<[Node; 3]>),
    Call {
        name: String,
        /// What stands before the point of `a.f(b)`.
        of: Option<Box<Node>>,
        arguments: Vec<Node>,
    },
}

/// What stands between two operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operator {
    And,
    Or,
    Compare(Comparison),
    Arithmetic(Arithmetic),
    In,
}

/// `==`, `!=`, `<`, `<=`, `>`, `>=`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Comparison {
    Equal,
    Unequal,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

impl Comparison {
    pub(super) fn sign(self) -> &'static str {
        match self {
            Self::Equal => "==",
            Self::Unequal => "!=",
            Self::Less => "<",
            Self::LessOrEqual => "<=",
            Self::Greater => ">",
            Self::GreaterOrEqual => ">=",
        }
    }

    pub(super) fn is_equality(self) -> bool {
        matches!(self, Self::Equal | Self::Unequal)
    }
}

impl Node {
    /// The parts it is made of.
    pub(super) fn parts(&self) -> Vec<&Node> {
        match &self.kind {
            Kind::Null
            | Kind::Bool(_)
            | Kind::Int(_)
            | Kind::Decimal(_)
            | Kind::Float(_)
            | Kind::Text(_)
            | Kind::Bytes(_)
            | Kind::Name(_) => Vec::new(),
            Kind::List(parts) => parts.iter().collect(),
            Kind::Field(part, _) | Kind::Has(part, _) | Kind::Not(part) | Kind::Negate(part) => vec![part],
            Kind::Index(left, right) | Kind::Binary(_, left, right) => vec![left, right],
            Kind::Choice(parts) => parts.iter().collect(),
            Kind::Call { of, arguments, .. } => of.iter().map(AsRef::as_ref).chain(arguments).collect(),
        }
    }
}

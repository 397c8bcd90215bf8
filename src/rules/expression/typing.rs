//! [`Node`] → [`Term`]: names become places, every part gets a type, and what does not go together is named at its place.

use std::borrow::Cow;
use std::ops::Range;

use tokio_postgres::types::Type as PgType;

use super::evaluate::{Column, Function, Load, Term, Which};
use super::instant::Form;
use super::tree::{Comparison, Kind, Node, Operator};
use super::value::{Arithmetic, Value, calculate};
use super::{BoundExpression, Expression, ExpressionError, Names, Scope, Wanted};
use crate::decode::types::{JsonType, TypeInfo};
use crate::suggest::nearest;

/// The type of a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Type {
    Null,
    Bool,
    Int,
    Decimal,
    Float,
    Text,
    /// Something that is known by its text form only.
    Opaque,
    Bytes,
    Time(Form),
    Span,
    /// Decided by the data.
    Json,
}

impl Type {
    fn name(self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool => "bool",
            Self::Int => "int",
            Self::Decimal => "decimal",
            Self::Float => "float",
            Self::Text | Self::Opaque => "text",
            Self::Bytes => "bytes",
            Self::Time(Form::Date) => "date",
            Self::Time(Form::Timestamp) => "timestamp",
            Self::Time(Form::TimestampTz) => "timestamptz",
            Self::Span => "duration",
            Self::Json => "json",
        }
    }

    pub(super) fn is_number(self) -> bool {
        matches!(self, Self::Int | Self::Decimal | Self::Float)
    }

    pub(super) fn is_text(self) -> bool {
        matches!(self, Self::Text | Self::Opaque)
    }

    /// Whether a value of it may be of this type: what comes out of JSON may be anything, NULL is of every type.
    pub(super) fn may_be(self, accepted: impl Fn(Type) -> bool) -> bool {
        matches!(self, Self::Json | Self::Null) || accepted(self)
    }

    /// Whether `==` makes sense between the two.
    fn is_comparable(self, other: Self) -> bool {
        let both = |is: fn(Type) -> bool| is(self) && is(other);
        matches!(self, Self::Json | Self::Null)
            || matches!(other, Self::Json | Self::Null)
            || self == other
            || both(Self::is_number)
            || both(Self::is_text)
            || both(|ty| matches!(ty, Self::Time(_)))
    }

    /// Whether `<` does too.
    fn is_ordered(self) -> bool {
        !matches!(self, Self::Opaque | Self::Bytes | Self::Null)
    }
}

/// A part, its type, and what that type is called where it comes from.
pub(super) struct Typed {
    pub(super) term: Term,
    pub(super) ty: Type,
    pub(super) type_name: String,
    pub(super) range: Range<usize>,
}

impl Typed {
    pub(super) fn new(term: Term, ty: Type, node: &Node) -> Self {
        Typed { term, ty, type_name: ty.name().to_owned(), range: node.range.clone() }
    }

    fn constant(&self) -> Option<&Value<'static>> {
        match &self.term {
            Term::Constant(value) => Some(value),
            _ => None,
        }
    }

    pub(super) fn boxed(self) -> Box<Term> {
        Box::new(self.term)
    }
}

/// Binds an expression; every problem in the order of the text.
pub(super) fn bind(
    expression: &Expression,
    scope: &Scope<'_>,
    wanted: Wanted,
) -> Result<BoundExpression, Vec<ExpressionError>> {
    let Expression { text, root } = expression;
    let mut binder = Binder { text, scope, problems: Vec::new(), columns: Vec::new(), old_columns: Vec::new() };
    let typed = binder.node(root).and_then(|typed| binder.wanted(typed, wanted));
    match typed {
        Some(typed) if binder.problems.is_empty() => Ok(BoundExpression {
            root: typed.term,
            columns: sorted(binder.columns),
            old_columns: sorted(binder.old_columns),
        }),
        _ => {
            binder.problems.sort_by_key(|problem| problem.range.start);
            Err(binder.problems)
        }
    }
}

fn sorted(mut places: Vec<usize>) -> Box<[usize]> {
    places.sort_unstable();
    places.dedup();
    places.into()
}

pub(super) struct Binder<'a> {
    pub(super) text: &'a str,
    scope: &'a Scope<'a>,
    problems: Vec<ExpressionError>,
    columns: Vec<usize>,
    old_columns: Vec<usize>,
}

impl Binder<'_> {
    /// Notes a problem.
    pub(super) fn wrong<T>(&mut self, problem: ExpressionError) -> Option<T> {
        self.problems.push(problem);
        None
    }

    /// The part bound; `None` where a problem was noted.
    pub(super) fn node(&mut self, node: &Node) -> Option<Typed> {
        let constant = |value, ty| Some(Typed::new(Term::Constant(value), ty, node));
        match &node.kind {
            Kind::Null => constant(Value::Null, Type::Null),
            Kind::Bool(truth) => constant(Value::Bool(*truth), Type::Bool),
            Kind::Int(integer) => constant(Value::Int(*integer), Type::Int),
            Kind::Decimal(decimal) => constant(Value::Decimal(*decimal), Type::Decimal),
            Kind::Float(float) => constant(Value::Float(*float), Type::Float),
            Kind::Text(text) => constant(Value::Text(Cow::Owned(text.clone())), Type::Text),
            Kind::Bytes(bytes) => constant(Value::Text(Cow::Owned(hex(bytes))), Type::Bytes),
            Kind::List(_) => self.wrong(
                ExpressionError::new(node.range.clone(), "has a list where none is supported")
                    .help("a list stands on the right of `in`: row.status in [\"new\", \"paid\"]"),
            ),
            Kind::Name(name) => self.name(name, node),
            Kind::Field(of, name) => self.field(of, name, node),
            Kind::Has(of, name) => self.has(of, name, node),
            Kind::Index(of, index) => self.index(of, index, node),
            Kind::Not(of) => {
                let of = self.condition(of, "!")?;
                Some(Typed::new(Term::Not(of.boxed()), Type::Bool, node))
            }
            Kind::Negate(of) => self.negate(of, node),
            Kind::Binary(operator, left, right) => self.binary(*operator, left, right, node),
            Kind::Choice(parts) => self.choice(parts, node),
            Kind::Call { name, of, arguments } => self.call(name, of.as_deref(), arguments, node),
        }
    }

    fn name(&mut self, name: &str, node: &Node) -> Option<Typed> {
        if name == "op" && self.scope.names == Names::Change {
            return Some(Typed::new(Term::Operation, Type::Text, node));
        }
        let range = node.range.clone();
        if which(name).is_some() {
            let problem = format!("uses `{name}` as a whole");
            return self.wrong(ExpressionError::new(range, problem).help(format!("name a column: {name}.id")));
        }
        let lower = name.to_ascii_lowercase();
        let problem = ExpressionError::new(range, format!("has a name that means nothing, `{name}`"));
        let problem = if name == "op" {
            ExpressionError::new(node.range.clone(), "uses `op`, which only a change of a row has")
        } else if matches!(lower.as_str(), "null" | "true" | "false") {
            problem.help(format!("write `{lower}`"))
        } else if let Some(column) = nearest(name, self.column_names()) {
            problem.help(format!("for the column write row.{column}"))
        } else {
            problem.help("columns are named as row.name")
        };
        self.wrong(problem)
    }

    fn column_names(&self) -> impl Iterator<Item = &str> {
        self.scope.relation.columns.iter().map(|column| column.name.as_str())
    }

    /// `of.name`
    fn field(&mut self, of: &Node, name: &str, node: &Node) -> Option<Typed> {
        if let Kind::Name(image) = &of.kind
            && let Some(which) = which(image)
        {
            return self.column(which, image, name, node);
        }
        let of = self.json(of, "a member")?;
        Some(Typed::new(Term::Member(of.boxed(), name.to_owned()), Type::Json, node))
    }

    fn column(&mut self, of: Which, image: &str, name: &str, node: &Node) -> Option<Typed> {
        if of != Which::Row && self.scope.names == Names::Row {
            let problem = format!("uses `{image}`, which only a change of a row has");
            return self.wrong(ExpressionError::new(node.range.clone(), problem).help(format!("write row.{name}")));
        }
        let Some(place) = self.scope.relation.column(name) else {
            let table = format!("{}.{}", self.scope.relation.schema, self.scope.relation.name);
            let problem = format!("names column `{name}`, which {table} does not have");
            let help = match nearest(name, self.column_names()) {
                Some(near) => format!("did you mean `{near}`?"),
                None => format!("columns are {}", self.column_names().collect::<Vec<_>>().join(", ")),
            };
            return self.wrong(ExpressionError::new(node.mark.clone(), problem).label("no such column").help(help));
        };
        let columns = if of == Which::Old { &mut self.old_columns } else { &mut self.columns };
        columns.push(place);
        let column = &self.scope.relation.columns[place];
        let info = self.scope.types.get(column.type_oid);
        let (load, ty) = load(info);
        let term = Term::Column(Column { of, place, in_identity: column.identity, load, json: info.json.clone() });
        Some(Typed { term, ty, type_name: info.name.clone(), range: node.range.clone() })
    }

    /// `has(of.name)`
    fn has(&mut self, of: &Node, name: &str, node: &Node) -> Option<Typed> {
        let field = Node { kind: Kind::Field(Box::new(of.clone()), name.to_owned()), ..node.clone() };
        let term = match self.field(of, name, &field)?.term {
            Term::Member(of, name) => Term::HasMember(of, name),
            column => Term::Not(Box::new(Term::IsNull(Box::new(column)))),
        };
        Some(Typed::new(term, Type::Bool, node))
    }

    /// `of[index]`
    fn index(&mut self, of: &Node, index: &Node, node: &Node) -> Option<Typed> {
        let of = self.json(of, "an element");
        let index = self.node(index)?;
        if !index.ty.may_be(|ty| ty == Type::Int || ty == Type::Text) {
            let problem = format!("looks for an element by {}", index.type_name);
            let help = "write the place, from 0, or the member's name: row.tags[0]";
            return self.wrong(ExpressionError::new(index.range, problem).help(help));
        }
        Some(Typed::new(Term::Element(of?.boxed(), index.boxed()), Type::Json, node))
    }

    /// Something that has parts.
    fn json(&mut self, node: &Node, part: &str) -> Option<Typed> {
        let typed = self.node(node)?;
        if typed.ty == Type::Json {
            return Some(typed);
        }
        let problem = format!("looks for {part} of {}, which has none", typed.type_name);
        self.wrong(ExpressionError::new(typed.range, problem).label("json, arrays and composite types have parts"))
    }

    /// An operand of `&&`, `||`, `!` or the condition of `?`.
    fn condition(&mut self, node: &Node, sign: &str) -> Option<Typed> {
        let typed = self.node(node)?;
        if typed.ty.may_be(|ty| ty == Type::Bool) {
            return Some(typed);
        }
        let problem = format!("has {} where `{sign}` needs bool", typed.type_name);
        let help = match typed.ty {
            Type::Text if sign == "||" => "to join texts write `+`".to_owned(),
            _ => self.truth_help(&typed),
        };
        self.wrong(ExpressionError::new(typed.range, problem).label(format!("this is {}", typed.type_name)).help(help))
    }

    /// How to ask something of a value that is no bool.
    fn truth_help(&self, typed: &Typed) -> String {
        let text = &self.text[typed.range.clone()];
        let other = match typed.ty {
            Type::Int | Type::Decimal | Type::Float => "0",
            Type::Text | Type::Opaque => "\"\"",
            _ => "null",
        };
        format!("compare it: {text} != {other}")
    }

    fn negate(&mut self, of: &Node, node: &Node) -> Option<Typed> {
        let of = self.node(of)?;
        if !of.ty.may_be(|ty| ty.is_number() || ty == Type::Span) {
            let problem = format!("takes the negative of {}", of.type_name);
            return self.wrong(ExpressionError::new(of.range, problem));
        }
        let ty = of.ty;
        Some(Typed::new(Term::Negate(of.boxed()), ty, node))
    }

    fn choice(&mut self, [condition, then, otherwise]: &[Node; 3], node: &Node) -> Option<Typed> {
        let condition = self.condition(condition, "?");
        let (then, otherwise) = (self.node(then), self.node(otherwise));
        let (condition, then, otherwise) = (condition?, then?, otherwise?);
        let Some(ty) = common(then.ty, otherwise.ty) else {
            let problem = format!("chooses between {} and {}", then.type_name, otherwise.type_name);
            let label = format!("this is {}", otherwise.type_name);
            let error = ExpressionError::new(otherwise.range, problem).label(label);
            return self.wrong(error.help("make both sides alike, for example with string(…)"));
        };
        let term = Term::Choice(Box::new([condition.term, widened(then, ty), widened(otherwise, ty)]));
        Some(Typed::new(term, ty, node))
    }

    fn binary(&mut self, operator: Operator, left: &Node, right: &Node, node: &Node) -> Option<Typed> {
        match operator {
            Operator::And => {
                let (left, right) = (self.condition(left, "&&"), self.condition(right, "&&"));
                Some(Typed::new(Term::And(left?.boxed(), right?.boxed()), Type::Bool, node))
            }
            Operator::Or => {
                let (left, right) = (self.condition(left, "||"), self.condition(right, "||"));
                Some(Typed::new(Term::Or(left?.boxed(), right?.boxed()), Type::Bool, node))
            }
            Operator::Compare(comparison) => self.compare(comparison, left, right, node),
            Operator::Arithmetic(operation) => self.calculate(operation, left, right, node),
            Operator::In => self.contained(left, right, node),
        }
    }

    fn compare(&mut self, comparison: Comparison, left: &Node, right: &Node, node: &Node) -> Option<Typed> {
        let (left, right) = (self.node(left), self.node(right));
        let (left, right) = (left?, right?);
        if left.ty == Type::Null || right.ty == Type::Null {
            return self.compare_null(comparison, left, right, node);
        }
        let (left, right) = self.comparable(left, right, node)?;
        if !comparison.is_equality()
            && let Some(unordered) = [&left, &right].into_iter().find(|side| !side.ty.is_ordered())
        {
            let problem = format!("compares {} by order, and only its text form is known", unordered.type_name);
            let error = ExpressionError::new(unordered.range.clone(), problem);
            return self.wrong(error.help("`==` and `!=` work; string(…) compares the text forms"));
        }
        Some(Typed::new(Term::Compare(comparison, left.boxed(), right.boxed()), Type::Bool, node))
    }

    /// `x == null` asks, unlike SQL, whether it is NULL.
    fn compare_null(&mut self, comparison: Comparison, left: Typed, right: Typed, node: &Node) -> Option<Typed> {
        let other = if left.ty == Type::Null { right } else { left };
        let asked = Term::IsNull(other.boxed());
        match comparison {
            Comparison::Equal => Some(Typed::new(asked, Type::Bool, node)),
            Comparison::Unequal => Some(Typed::new(Term::Not(Box::new(asked)), Type::Bool, node)),
            _ => {
                let error = ExpressionError::new(node.range.clone(), "compares with null by order");
                self.wrong(error.help("write `== null` or `!= null`"))
            }
        }
    }

    /// Two sides that `==` can compare, constants brought to the other's type.
    fn comparable(&mut self, left: Typed, right: Typed, node: &Node) -> Option<(Typed, Typed)> {
        if !left.ty.is_comparable(right.ty) {
            let problem = format!("compares {} with {}", left.type_name, right.type_name);
            let error = ExpressionError::new(node.range.clone(), problem);
            return self.wrong(compare_help(error, &left, &right));
        }
        for (side, other) in [(&left, &right), (&right, &left)] {
            if let Some(Value::Text(text)) = side.constant()
                && other.type_name == "uuid"
                && !is_uuid_text(text)
            {
                let problem = "compares a uuid with a text that no uuid has";
                let help = format!("write its 36 characters in lower case: \"{}\"", text.to_ascii_lowercase());
                let error = ExpressionError::new(side.range.clone(), problem).help(help);
                return self.wrong(error);
            }
        }
        let (left_ty, right_ty) = (left.ty, right.ty);
        Some((as_float(left, right_ty), as_float(right, left_ty)))
    }

    fn calculate(&mut self, operation: Arithmetic, left: &Node, right: &Node, node: &Node) -> Option<Typed> {
        let (left, right) = (self.node(left), self.node(right));
        let (left, right) = (left?, right?);
        let Some(ty) = result_type(operation, left.ty, right.ty) else {
            return self.wrong(calculate_error(operation, &left, &right, node));
        };
        let (left_ty, right_ty) = (left.ty, right.ty);
        let (left, right) = (as_float(left, right_ty), as_float(right, left_ty));
        if let (Some(left), Some(right)) = (left.constant(), right.constant()) {
            return match calculate(operation, left, right) {
                Ok(value) => Some(Typed::new(Term::Constant(value), ty, node)),
                Err(error) => self.wrong(ExpressionError::new(node.range.clone(), format!("cannot work: {error}"))),
            };
        }
        Some(Typed::new(Term::Calculate(operation, left.boxed(), right.boxed()), ty, node))
    }

    /// `needle in list`
    fn contained(&mut self, needle: &Node, list: &Node, node: &Node) -> Option<Typed> {
        let needle = self.node(needle);
        let Kind::List(elements) = &list.kind else {
            let container = self.node(list);
            let (needle, container) = (needle?, container?);
            if container.ty != Type::Json {
                let problem = format!("looks into {} with `in`", container.type_name);
                let error = ExpressionError::new(container.range.clone(), problem)
                    .help("write a list, row.status in [\"new\", \"paid\"], or name an array column");
                return self.wrong(match container.ty {
                    Type::Text => error.help("for a part of a text write row.name.contains(\"…\")"),
                    _ => error,
                });
            }
            return Some(Typed::new(Term::InContainer(needle.boxed(), container.boxed()), Type::Bool, node));
        };
        let elements: Vec<_> = elements.iter().map(|element| (element, self.node(element))).collect();
        let mut needle = needle?;
        let mut terms = Vec::with_capacity(elements.len());
        for (place, element) in elements {
            let (fitted, element) = self.comparable(needle, element?, place)?;
            needle = fitted;
            terms.push(element.term);
        }
        Some(Typed::new(Term::InList(needle.boxed(), terms.into()), Type::Bool, node))
    }

    /// What the whole expression must give.
    fn wanted(&mut self, typed: Typed, wanted: Wanted) -> Option<Typed> {
        let (fits, what) = match wanted {
            Wanted::Condition => (typed.ty.may_be(|ty| ty == Type::Bool), "a condition (bool)"),
            Wanted::Value => (typed.ty != Type::Span, "a value that JSON can show"),
            Wanted::Number => (typed.ty.may_be(|ty| ty.is_number() || ty == Type::Span), "a number"),
            Wanted::Timestamp => (typed.ty.may_be(|ty| matches!(ty, Type::Time(_))), "a point in time"),
        };
        if fits {
            return Some(typed);
        }
        let error = ExpressionError::new(typed.range.clone(), format!("gives {}, not {what}", typed.type_name))
            .label(format!("this is {}", typed.type_name));
        self.wrong(match wanted {
            Wanted::Condition => error.help(self.truth_help(&typed)),
            Wanted::Value => error.help("string(…) gives its seconds"),
            Wanted::Number if typed.ty == Type::Text => error.help("write int(…) or double(…) for a text of digits"),
            Wanted::Number => error,
            Wanted::Timestamp => {
                error.help("name a column of a date or time, or write timestamp(\"2030-01-01T00:00:00Z\")")
            }
        })
    }
}

fn which(name: &str) -> Option<Which> {
    Some(match name {
        "row" => Which::Row,
        "old" => Which::Old,
        "new" => Which::New,
        _ => return None,
    })
}

/// How a column's text form is read, and its type.
fn load(info: &TypeInfo) -> (Load, Type) {
    let base = PgType::from_oid(info.base).unwrap_or(PgType::UNKNOWN);
    match base {
        PgType::INT2 | PgType::INT4 | PgType::INT8 | PgType::OID => return (Load::Int, Type::Int),
        PgType::FLOAT4 | PgType::FLOAT8 => return (Load::Float, Type::Float),
        PgType::NUMERIC => return (Load::Decimal, Type::Decimal),
        PgType::TEXT | PgType::VARCHAR | PgType::NAME => return (Load::Text, Type::Text),
        PgType::BPCHAR => return (Load::Padded, Type::Text),
        PgType::BYTEA => return (Load::Text, Type::Bytes),
        _ => {}
    }
    match info.json.as_ref() {
        JsonType::Bool => (Load::Bool, Type::Bool),
        JsonType::Date => (Load::Time(Form::Date), Type::Time(Form::Date)),
        JsonType::Timestamp => (Load::Time(Form::Timestamp), Type::Time(Form::Timestamp)),
        JsonType::TimestampTz => (Load::Time(Form::TimestampTz), Type::Time(Form::TimestampTz)),
        JsonType::Json => (Load::Json, Type::Json),
        JsonType::Array { .. } | JsonType::Vector(_) | JsonType::Composite(_) | JsonType::Hstore => {
            (Load::Container, Type::Json)
        }
        JsonType::Number | JsonType::Text => (Load::Text, Type::Opaque),
    }
}

/// The hex form of `byteaout`.
fn hex(bytes: &[u8]) -> String {
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("\\x{digits}")
}

/// What `uuid_out` writes.
fn is_uuid_text(text: &str) -> bool {
    text.len() == 36
        && text.bytes().enumerate().all(|(place, byte)| match place {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => matches!(byte, b'0'..=b'9' | b'a'..=b'f'),
        })
}

/// A constant that meets a float becomes one now and not for each row.
fn as_float(mut typed: Typed, other: Type) -> Typed {
    let float = match typed.constant() {
        Some(Value::Int(integer)) => Some(*integer as f64),
        Some(Value::Decimal(decimal)) => Some(decimal.to_f64()),
        _ => None,
    };
    if let Some(float) = float.filter(|_| other == Type::Float) {
        typed.term = Term::Constant(Value::Float(float));
        typed.ty = Type::Float;
    }
    typed
}

/// A side of a choice whose other side is a float is one too, so that what is done with it does not depend on the row.
fn widened(typed: Typed, ty: Type) -> Term {
    match as_float(typed, ty) {
        typed if ty == Type::Float && typed.ty.is_number() && typed.ty != ty => {
            Term::Apply(Function::Double, typed.boxed())
        }
        typed => typed.term,
    }
}

/// The type that two sides of a choice have in common.
fn common(left: Type, right: Type) -> Option<Type> {
    match (left, right) {
        _ if left == right => Some(left),
        (Type::Null, other) | (other, Type::Null) => Some(other),
        (Type::Json, _) | (_, Type::Json) => Some(Type::Json),
        _ if left.is_number() && right.is_number() => Some(widest(left, right)),
        _ if left.is_text() && right.is_text() => Some(Type::Text),
        _ => None,
    }
}

/// Of two kinds of numbers.
fn widest(left: Type, right: Type) -> Type {
    match (left, right) {
        (Type::Float, _) | (_, Type::Float) => Type::Float,
        (Type::Decimal, _) | (_, Type::Decimal) => Type::Decimal,
        _ => Type::Int,
    }
}

/// The type of `left operation right`, if there is one.
fn result_type(operation: Arithmetic, left: Type, right: Type) -> Option<Type> {
    use Arithmetic::{Add, Divide, Remainder, Subtract};
    match (operation, left, right) {
        (_, Type::Null, _) | (_, _, Type::Null) => None,
        (_, Type::Json, other) | (_, other, Type::Json) => {
            let calculates = other == Type::Json || other.is_number() || other == Type::Text;
            calculates.then_some(Type::Json)
        }
        (Add, _, _) if left.is_text() && right.is_text() => Some(Type::Text),
        (Add, Type::Time(form), Type::Span) | (Add, Type::Span, Type::Time(form)) => Some(Type::Time(moved(form))),
        (Subtract, Type::Time(form), Type::Span) => Some(Type::Time(moved(form))),
        (Subtract, Type::Time(_), Type::Time(_)) | (Add | Subtract, Type::Span, Type::Span) => Some(Type::Span),
        _ if !left.is_number() || !right.is_number() => None,
        (Divide, _, _) => Some(widest(left, right)).filter(|widest| *widest != Type::Decimal),
        (Remainder, _, _) => Some(widest(left, right)).filter(|widest| *widest == Type::Int),
        _ => Some(widest(left, right)),
    }
}

/// A date with a time of day is a timestamp.
fn moved(form: Form) -> Form {
    if form == Form::Date { Form::Timestamp } else { form }
}

fn calculate_error(operation: Arithmetic, left: &Typed, right: &Typed, node: &Node) -> ExpressionError {
    let sign = operation.sign();
    let problem = format!("has `{sign}` between {} and {}", left.type_name, right.type_name);
    let error = ExpressionError::new(node.range.clone(), problem);
    match (operation, left.ty, right.ty) {
        (Arithmetic::Divide, left, right) if left.is_number() && right.is_number() => {
            error.help("a decimal's quotient may never end: divide floats, with double(…) around one side")
        }
        (Arithmetic::Remainder, left, right) if left.is_number() && right.is_number() => {
            error.help("`%` takes integers: int(…) drops what stands behind the point")
        }
        (Arithmetic::Add, left, right) if left.is_text() || right.is_text() => {
            error.help("to join texts write string(…) around the other side")
        }
        (Arithmetic::Add | Arithmetic::Subtract, Type::Time(_), _) => {
            error.help("a span of time is written duration(\"1h\")")
        }
        (_, Type::Null, _) | (_, _, Type::Null) => error.help("what touches null is null"),
        _ => error,
    }
}

fn compare_help(error: ExpressionError, left: &Typed, right: &Typed) -> ExpressionError {
    let (constant, other) = match (left.constant(), right.constant()) {
        (Some(value), None) => (value, right.ty),
        (None, Some(value)) => (value, left.ty),
        _ => return error.help("make both sides alike, for example with string(…)"),
    };
    match (constant, other) {
        (Value::Text(_), Type::Time(_)) => error.help("write timestamp(\"2024-01-01T00:00:00Z\")"),
        (Value::Text(text), other) if other.is_number() && text.parse::<f64>().is_ok() => {
            error.help(format!("leave out the quotes: {text}"))
        }
        (Value::Text(_), Type::Bool) | (Value::Int(_), Type::Bool) => {
            error.help("a bool stands for itself: `row.active`, or `!row.active`")
        }
        (Value::Int(_) | Value::Decimal(_), other) if other.is_text() => error.help("put the number into quotes"),
        (Value::Text(_), Type::Bytes) => error.help("write bytes as b\"…\""),
        (Value::Text(text), Type::Span) => error.help(format!("write duration(\"{text}\")")),
        _ => error,
    }
}

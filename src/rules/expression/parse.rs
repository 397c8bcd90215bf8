//! Text → [`Node`]: the `cel` crate's parser, its tree with whole ranges instead of single tokens, and messages in the
//! words of this file instead of the grammar's.

use std::ops::Range;

use cel::common::ast::{CallExpr, Expr, IdedExpr, LiteralValue, SourceInfo, operators};
use cel::parser::{ParseErrors, Parser};

use super::ExpressionError;
use super::decimal::Decimal;
use super::lexemes::{Brackets, Kind as LexemeKind, Lexeme, brackets, lexemes, sql};
use super::tree::{Comparison, Kind, Node, Operator};
use super::value::Arithmetic;

/// How deep the parser's rule for a whole expression may nest: brackets are fewer, so this is for `? : ? :`.
const CHOICES_MAX: u16 = 24;

/// The stack that the parser gets: a bracket takes it 150 KB of an unoptimized build's, and a test's thread has 2 MB.
const STACK_BYTES: usize = 16 << 20;

/// Reads an expression.
pub(super) fn parse(text: &str) -> Result<Node, ExpressionError> {
    let lexemes = lexemes(text)?;
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("parser".to_owned()).stack_size(STACK_BYTES);
        let parsed = thread.spawn_scoped(scope, || read(text, &lexemes)).map(std::thread::ScopedJoinHandle::join);
        // No thread to be had, or a fault of the parser: either way only this text is lost.
        let failed = || ExpressionError::new(0..text.len(), "cannot be read: the parser failed");
        parsed.map_err(|_| failed())?.map_err(|_| failed())?
    })
}

fn read(text: &str, lexemes: &[Lexeme]) -> Result<Node, ExpressionError> {
    let Brackets { pairs, open } = brackets(text, lexemes);
    // The first error is enough, and going on behind it would show trees with holes.
    let parser = Parser::new().max_recursion_depth(CHOICES_MAX).error_recovery_limit(0);
    let parsed = parser.parse_with_source_info(text);
    let (tree, source) = parsed.map_err(|errors| syntax_error(text, lexemes, &open, &errors))?;
    Reader { text, source, pairs }.node(&tree)
}

/// What is wrong where the parser stopped.
fn syntax_error(text: &str, lexemes: &[Lexeme], open: &[usize], errors: &ParseErrors) -> ExpressionError {
    if let Some(error) = sql(text, lexemes) {
        return error;
    }
    // The parser also reports that it gave up, sometimes at an earlier place than why.
    let gave_up = |message: &str| message.contains("recovery attempt limit");
    let told = errors.errors.iter().find(|error| !gave_up(&error.msg)).or(errors.errors.first());
    let at = told.map_or(0, |error| offset(text, error.pos));
    let Some(lexeme) = lexemes.iter().find(|lexeme| lexeme.range.end > at) else {
        if let Some(&start) = open.last() {
            return ExpressionError::new(start..start + 1, "has a bracket that is not closed");
        }
        let problem = if lexemes.is_empty() { "is empty" } else { "ends too early" };
        return ExpressionError::new(text.len()..text.len(), problem).label("something is missing here");
    };
    let (problem, help) = explained(told.map_or("", |error| error.msg.as_str()), text, lexeme);
    ExpressionError::new(lexeme.range.clone(), problem).help(help)
}

/// The parser's message in the words of this file, and what to do.
fn explained(message: &str, text: &str, lexeme: &Lexeme) -> (String, String) {
    let found = &text[lexeme.range.clone()];
    let is_text = lexeme.kind == LexemeKind::Text;
    if message.starts_with("reserved identifier") {
        (format!("uses `{found}`, which CEL reserves"), format!("for a column of that name write row[\"{found}\"]"))
    } else if message.starts_with("invalid int literal") {
        (format!("has the integer {found}, which does not fit into 64 bits"), format!("write {found}.0 for a decimal"))
    } else if is_text && (message.contains("token recognition error") || message.starts_with("invalid ")) {
        ("has a text with an escape that CEL does not know".to_owned(), "write a backslash as `\\\\`".to_owned())
    } else if message.contains("Recursion limit") {
        (format!("nests more than {CHOICES_MAX} choices"), "put a part of it into another rule".to_owned())
    } else if message.starts_with("invalid argument to has()") {
        (
            "calls `has` with something that is no field".to_owned(),
            "write has(row.column), or row[\"a column\"] != null".to_owned(),
        )
    } else if message.starts_with("unsupported syntax") {
        ("has an optional field, which is not supported".to_owned(), "a member that is missing is null".to_owned())
    } else if lexeme.kind == LexemeKind::Word && text[..lexeme.range.start].ends_with('.') {
        (format!("cannot read `{found}` behind a point"), format!("write row[\"{found}\"]"))
    } else {
        let help = "the syntax is that of CEL: row.status == \"active\" && row.amount > 10";
        (format!("cannot be read at `{found}`"), help.to_owned())
    }
}

/// The byte at a line and column, both from 1 and in characters.
fn offset(text: &str, (line, column): (isize, isize)) -> usize {
    let (Ok(line), Ok(column)) = (usize::try_from(line - 1), usize::try_from(column - 1)) else { return 0 };
    let begin: usize = text.split_inclusive('\n').take(line).map(str::len).sum();
    begin + text[begin..].chars().take(column).map(char::len_utf8).sum::<usize>()
}

/// Turns the crate's tree, which knows one token of each node, into ours.
struct Reader<'t> {
    text: &'t str,
    source: SourceInfo,
    pairs: Vec<Range<usize>>,
}

impl Reader<'_> {
    fn node(&self, tree: &IdedExpr) -> Result<Node, ExpressionError> {
        let token = self.token(tree.id);
        match &tree.expr {
            Expr::Literal(literal) => self.literal(literal, token),
            Expr::Ident(name) => Ok(self.leaf(Kind::Name(name.clone()), token)),
            Expr::Select(select) => {
                let operand = self.node(&select.operand)?;
                if select.test {
                    let range = self.called(&token);
                    let point = self.text[operand.range.end..].find('.').unwrap_or(0);
                    let mark = self.word_behind(operand.range.end + point + 1);
                    return Ok(Node { kind: Kind::Has(Box::new(operand), select.field.clone()), range, mark });
                }
                let mark = self.word_behind(token.end);
                let range = operand.range.start..mark.end;
                Ok(Node { kind: Kind::Field(Box::new(operand), select.field.clone()), range, mark })
            }
            Expr::Call(call) => self.call(call, token),
            Expr::List(list) if list.optional_indices.is_empty() => {
                let elements = list.elements.iter().map(|element| self.node(element)).collect::<Result<_, _>>()?;
                Ok(Node { kind: Kind::List(elements), range: self.bracket(&token), mark: token })
            }
            Expr::List(_) => Err(unsupported(token, "optional elements")),
            Expr::Map(_) => Err(unsupported(self.bracket(&token), "a map")),
            Expr::Struct(_) => Err(unsupported(self.called(&token), "a message")),
            Expr::Comprehension(_) => {
                let range = self.called(&token);
                let name = self.word_before(token.start);
                let what = format!("`{}`", &self.text[name]);
                Err(unsupported(range, &what).help("`in` looks into a list: \"a\" in row.tags"))
            }
            Expr::Unspecified => Err(unsupported(token, "this")),
        }
    }

    fn literal(&self, literal: &LiteralValue, token: Range<usize>) -> Result<Node, ExpressionError> {
        let kind = match literal {
            LiteralValue::Null => Kind::Null,
            LiteralValue::Boolean(truth) => Kind::Bool(*truth.inner()),
            LiteralValue::Int(integer) => {
                let kind = Kind::Int(*integer.inner());
                return Ok(self.leaf(kind, self.signed(token, *integer.inner() < 0)));
            }
            LiteralValue::Double(double) => {
                let range = self.signed(token, double.inner().is_sign_negative());
                let digits: String = self.text[range.clone()].split_whitespace().collect();
                let kind = match Decimal::parse(digits.as_bytes()) {
                    Ok(decimal) => Kind::Decimal(decimal),
                    Err(_) if digits.contains(['e', 'E']) => Kind::Float(*double.inner()),
                    Err(_) => return Err(ExpressionError::new(range, "has a decimal of more than 38 digits")),
                };
                return Ok(self.leaf(kind, range));
            }
            LiteralValue::String(text) => Kind::Text(text.inner().to_owned()),
            LiteralValue::Bytes(bytes) => Kind::Bytes(bytes.inner().to_vec()),
            LiteralValue::UInt(_) => {
                return Err(unsupported(token, "an unsigned integer").help("leave out the `u`"));
            }
        };
        Ok(self.leaf(kind, token))
    }

    fn leaf(&self, kind: Kind, range: Range<usize>) -> Node {
        Node { kind, mark: range.clone(), range }
    }

    fn call(&self, call: &CallExpr, token: Range<usize>) -> Result<Node, ExpressionError> {
        let of = call.target.as_deref().map(|target| self.node(target)).transpose()?;
        let mut arguments = call.args.iter().map(|tree| self.node(tree)).collect::<Result<Vec<_>, _>>()?;
        let name = call.func_name.as_str();
        if of.is_none() && matches!(name, operators::OPT_INDEX | operators::OPT_SELECT) {
            return Err(unsupported(token, "an optional field").help("a field that is missing is null"));
        }
        if of.is_none() && arguments.len() == 3 && name == operators::CONDITIONAL {
            let parts: Result<[Node; 3], _> = arguments.try_into();
            let parts = Box::new(parts.map_err(|_| unsupported(token.clone(), "this"))?);
            let range = self.balanced(parts[0].range.start..parts[2].range.end);
            return Ok(Node { kind: Kind::Choice(parts), range, mark: token });
        }
        if of.is_none() && arguments.len() == 2 && (operator(name).is_some() || name == operators::INDEX) {
            return Ok(self.binary(name, arguments.remove(0), arguments.remove(0), token));
        }
        if of.is_none() && arguments.len() == 1 && matches!(name, operators::LOGICAL_NOT | operators::NEGATE) {
            let operand = Box::new(arguments.remove(0));
            let range = self.balanced(token.start..operand.range.end);
            let kind = if name == operators::NEGATE { Kind::Negate(operand) } else { Kind::Not(operand) };
            return Ok(Node { kind, range, mark: token });
        }
        let mark = self.word_before(token.start);
        let start = of.as_ref().map_or(mark.start, |of| of.range.start);
        let range = start..self.bracket(&token).end;
        let kind = Kind::Call { name: name.to_owned(), of: of.map(Box::new), arguments };
        Ok(Node { kind, range, mark })
    }

    fn binary(&self, name: &str, left: Node, right: Node, token: Range<usize>) -> Node {
        let (left, right) = (Box::new(left), Box::new(right));
        match operator(name) {
            Some(operator) => {
                let range = self.balanced(left.range.start..right.range.end);
                Node { kind: Kind::Binary(operator, left, right), range, mark: token }
            }
            None => {
                let range = left.range.start..self.bracket(&token).end;
                let mark = right.range.clone();
                match right.kind {
                    Kind::Text(name) => Node { kind: Kind::Field(left, name), range, mark },
                    _ => Node { kind: Kind::Index(left, right), range, mark },
                }
            }
        }
    }

    /// The token that the crate remembers of a node.
    fn token(&self, id: u64) -> Range<usize> {
        let place = self.source.offset_for(id).map(|(start, last)| start as usize..(last as usize).saturating_add(1));
        place.filter(|range| self.text.get(range.clone()).is_some()).unwrap_or(0..self.text.len())
    }

    /// A number with its minus, which is a token of its own.
    fn signed(&self, token: Range<usize>, negative: bool) -> Range<usize> {
        let minus = self.text[..token.start].rfind('-').filter(|_| negative);
        minus.unwrap_or(token.start)..token.end
    }

    /// The bracket that opens at a token.
    fn bracket(&self, opening: &Range<usize>) -> Range<usize> {
        self.pairs.iter().find(|pair| pair.start == opening.start).unwrap_or(opening).clone()
    }

    /// The word before an opening bracket, and all of the bracket.
    fn called(&self, opening: &Range<usize>) -> Range<usize> {
        self.word_before(opening.start).start..self.bracket(opening).end
    }

    fn word_before(&self, at: usize) -> Range<usize> {
        let before = self.text[..at].trim_end();
        let letters = before.chars().rev().take_while(|&c| c.is_alphanumeric() || c == '_').map(char::len_utf8);
        before.len() - letters.sum::<usize>()..before.len()
    }

    fn word_behind(&self, at: usize) -> Range<usize> {
        let behind = self.text[at..].trim_start();
        let start = self.text.len() - behind.len();
        start..start + behind.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(behind.len())
    }

    /// With the other half of every bracket that the range cuts.
    fn balanced(&self, range: Range<usize>) -> Range<usize> {
        self.pairs.iter().fold(range, |range, pair| {
            let cut = range.contains(&pair.start) != range.contains(&(pair.end - 1));
            if cut { range.start.min(pair.start)..range.end.max(pair.end) } else { range }
        })
    }
}

/// The operator by the name that CEL's functions have.
fn operator(name: &str) -> Option<Operator> {
    Some(match name {
        operators::LOGICAL_AND => Operator::And,
        operators::LOGICAL_OR => Operator::Or,
        operators::EQUALS => Operator::Compare(Comparison::Equal),
        operators::NOT_EQUALS => Operator::Compare(Comparison::Unequal),
        operators::LESS => Operator::Compare(Comparison::Less),
        operators::LESS_EQUALS => Operator::Compare(Comparison::LessOrEqual),
        operators::GREATER => Operator::Compare(Comparison::Greater),
        operators::GREATER_EQUALS => Operator::Compare(Comparison::GreaterOrEqual),
        operators::ADD => Operator::Arithmetic(Arithmetic::Add),
        operators::SUBSTRACT => Operator::Arithmetic(Arithmetic::Subtract),
        operators::MULTIPLY => Operator::Arithmetic(Arithmetic::Multiply),
        operators::DIVIDE => Operator::Arithmetic(Arithmetic::Divide),
        operators::MODULO => Operator::Arithmetic(Arithmetic::Remainder),
        operators::IN => Operator::In,
        _ => return None,
    })
}

fn unsupported(range: Range<usize>, what: &str) -> ExpressionError {
    ExpressionError::new(range, format!("has {what}, which is not supported"))
}

//! The kinds of mistakes, each with a number that stays: `error[KS012]`, `keepstep explain KS012`.
//!
//! A code names a kind of mistake and not a sentence: several messages share one where the same thing is to be learned
//! from them. One list makes the codes, what `explain` and the reference say of them, and the tests that try the
//! examples. A number is never given to another kind; what is no longer found keeps its place as a gap.

use std::fmt;

/// What is known of a code.
#[derive(Clone, Copy, Debug)]
pub struct Explanation {
    /// The code.
    pub code: Code,
    /// The kind of mistake, without a full stop.
    pub title: &'static str,
    /// Why it is one, and what to do.
    pub text: &'static str,
    /// Statements and a piece of a rules file that lead to it; empty where no file shows it.
    pub wrong: &'static str,
    /// The same put right.
    pub right: &'static str,
}

macro_rules! codes {
    ($($number:literal $code:ident: $title:literal, $text:literal, $wrong:literal => $right:literal;)*) => {
        /// A kind of mistake.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Code {
            $(#[doc = $title] $code,)*
        }

        impl Code {
            /// Its number.
            pub fn number(self) -> u16 {
                match self { $(Self::$code => $number,)* }
            }
        }

        /// Every code, by number.
        pub const CODES: &[Explanation] = &[
            $(Explanation { code: Code::$code, title: $title, text: $text, wrong: $wrong, right: $right },)*
        ];
    };
}

impl Code {
    /// The code that is written `KS012`, `ks12` or `12`.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.get(..2).filter(|start| start.eq_ignore_ascii_case("ks")).map_or(text, |_| &text[2..]);
        let number: u16 = digits.parse().ok()?;
        CODES.iter().map(|known| known.code).find(|code| code.number() == number)
    }

    /// What is known of it.
    pub fn explanation(self) -> Option<&'static Explanation> {
        CODES.iter().find(|known| known.code == self)
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KS{:03}", self.number())
    }
}

codes! {
    1 UnreadableFile: "the rules file cannot be read",
    "There is no such file, it may not be read, it is not UTF-8, or it is larger than 16 MiB with all that it includes; or \
     `include` names no file, or too many. Without `--config` \
     (or KEEPSTEP_CONFIG) the file is `keepstep.toml` in the folder where keepstep was started.",
    "" => "";

    2 NotToml: "this is not TOML",
    "The lines that no TOML parser understands are left out, and everything else in the file is checked all the same. \
     Most often a text lacks its quotes, or a bracket or quote is not closed.",
    "[rule.feed]\ntable  = public.products\ndelete = [\"feed:global\"]\n"
    => "[rule.feed]\ntable  = \"public.products\"\ndelete = [\"feed:global\"]\n";

    3 GivenTwice: "a key is given twice",
    "A field or a table with the same name stands twice in the same place, and nothing says which one counts.",
    "[rule.feed]\ntable  = \"public.products\"\ndelete = [\"feed:global\"]\ndelete = [\"feed:new\"]\n"
    => "[rule.feed]\ntable  = \"public.products\"\ndelete = [\"feed:global\", \"feed:new\"]\n";

    4 MissingTable: "a table of the file is missing",
    "A rules file needs [postgres] and [redis] with a `url` each, and at least one [rule.NAME].",
    "[postgres]\nurl = \"${DATABASE_URL}\"\n\n[redis]\nurl = \"${REDIS_URL}\"\n"
    => "[postgres]\nurl = \"${DATABASE_URL}\"\n\n[redis]\nurl = \"${REDIS_URL}\"\n\n\
        [rule.feed]\ntable  = \"public.products\"\ndelete = [\"feed:global\"]\n";

    5 UnknownTable: "a table of the file is unknown",
    "The tables of a rules file have fixed names; those of rules begin with `rule.`.",
    "[rules.feed]\ntable  = \"public.products\"\ndelete = [\"feed:global\"]\n"
    => "[rule.feed]\ntable  = \"public.products\"\ndelete = [\"feed:global\"]\n";

    6 NotATable: "what must be a table is none",
    "Rules are tables of their own with a name each: [rule.feed], not [[rule]] and not fields directly in [rule].",
    "[[rule]]\ntable  = \"public.products\"\ndelete = [\"feed:global\"]\n"
    => "[rule.feed]\ntable  = \"public.products\"\ndelete = [\"feed:global\"]\n";

    7 RuleName: "this cannot be the name of a rule",
    "The name of a rule is a label of metrics, so it is made of letters, digits, `-` and `_`, at most 64.",
    "[rule.\"all products\"]\ntable  = \"public.products\"\ndelete = [\"feed:global\"]\n"
    => "[rule.all-products]\ntable  = \"public.products\"\ndelete = [\"feed:global\"]\n";

    8 MoreThanRules: "an included file holds more than rules",
    "Servers, [admin], [defaults] and `include` stand in the rules file itself, so that there is one place to look for \
     them. What it includes holds [rule.NAME] alone.",
    "" => "";

    10 UnknownField: "a field is unknown",
    "No table of a rules file has a field of this name. `keepstep reference` lists every field; an editor with the JSON \
     Schema completes them.",
    "[rule.feed]\ntable   = \"public.products\"\ndeletes = [\"feed:global\"]\n"
    => "[rule.feed]\ntable  = \"public.products\"\ndelete = [\"feed:global\"]\n";

    11 MisplacedField: "a field stands in the wrong table",
    "In TOML a field belongs to the nearest header above it. What stands above the first header belongs to none, and \
     what stands below [rule.NAME.vars] is one of its `vars`.",
    "[rule.feed]\ntable  = \"public.products\"\nprefix = \"shop:\"\ndelete = [\"feed:global\"]\n"
    => "[redis]\nurl    = \"redis://cache\"\nprefix = \"shop:\"\n\n\
        [rule.feed]\ntable  = \"public.products\"\ndelete = [\"feed:global\"]\n";

    12 MissingField: "a field is missing",
    "These fields have no default: `url` in [postgres] and [redis], `table` in a rule.",
    "[rule.feed]\ndelete = [\"feed:global\"]\n"
    => "[rule.feed]\ntable  = \"public.products\"\ndelete = [\"feed:global\"]\n";

    13 MissingPartner: "a field needs another one",
    "Some fields mean something only together: `key` with `value` and `columns`, everything about a written key with \
     `key`, `jitter` with a `ttl`, `tags` with `write = \"present\"`, `client_cert` with `client_key`.",
    "[rule.product]\ntable = \"public.products\"\nkey   = \"product:{id}\"\n"
    => "[rule.product]\ntable   = \"public.products\"\nkey     = \"product:{id}\"\nvalue   = \"json\"\ncolumns = [\"*\"]\n";

    14 NotYet: "not available in this version yet",
    "The field or value is known and will be read by a later version. It is refused rather than ignored, because a \
     file that seems to work and does something else would be worse.",
    "[redis]\nurl = \"redis+cluster://cache\"\n" => "[redis]\nurl = \"redis://cache\"\n";

    15 WrongType: "a value is of the wrong type",
    "Durations, sizes, shares and rates are texts with their unit, so that no number leaves open what it counts. Lists \
     are lists even with one item.",
    "[rule.feed]\ntable  = \"public.products\"\ndelete = \"feed:global\"\n"
    => "[rule.feed]\ntable  = \"public.products\"\ndelete = [\"feed:global\"]\n";

    16 Empty: "a value is empty",
    "An empty text or list says nothing. Leave the field out to have its default.",
    "[rule.feed]\ntable   = \"public.products\"\nchanged = []\ndelete  = [\"feed:global\"]\n"
    => "[rule.feed]\ntable  = \"public.products\"\ndelete = [\"feed:global\"]\n";

    17 NamedTwice: "a list names something twice",
    "The second one would do nothing; perhaps another one was meant.",
    "[rule.feed]\ntable  = \"public.products\"\ndelete = [\"feed:global\", \"feed:global\"]\n"
    => "[rule.feed]\ntable  = \"public.products\"\ndelete = [\"feed:global\"]\n";

    18 NotAChoice: "a value is none of those that the field takes",
    "The message lists what the field takes. TRUNCATE is no operation of its own in `on`: it counts where \"delete\" does.",
    "[rule.feed]\ntable  = \"public.products\"\non     = [\"insert\", \"truncate\"]\ndelete = [\"feed:global\"]\n"
    => "[rule.feed]\ntable  = \"public.products\"\non     = [\"insert\", \"delete\"]\ndelete = [\"feed:global\"]\n";

    19 OutOfRange: "a value is too small or too large",
    "The message says from where to where it may go.",
    "[redis]\nurl       = \"redis://cache\"\nbatch_ops = 0\n" => "[redis]\nurl       = \"redis://cache\"\nbatch_ops = 4096\n";

    20 Quantity: "this is no duration, size, share or rate",
    "Durations are like \"100ms\", \"30s\", \"12h\", \"1h 30m\"; sizes like \"64KiB\", \"8GiB\"; shares like \"10%\"; rates like \
     \"5000/s\", \"0.1%/min\". A unit is never left out.",
    "[redis]\nurl     = \"redis://cache\"\ntimeout = \"10\"\n" => "[redis]\nurl     = \"redis://cache\"\ntimeout = \"10s\"\n";

    25 UnsetVariable: "an environment variable is not set",
    "`${NAME}` stands for a variable of the process that reads the file; `${NAME:-text}` has a default, \
     `${file:/path}` reads a file.",
    "[redis]\nurl = \"${CACHE_URL}\"\n" => "[redis]\nurl = \"${CACHE_URL:-redis://cache}\"\n";

    26 UnreadableSecret: "the file of a `${file:…}` cannot be read",
    "The path is taken as it is; a relative one begins where keepstep was started. A file of more than 64 KiB is taken to \
     be a wrong path.",
    "[redis]\nurl = \"redis://:${file:/nowhere/password}@cache\"\n" => "[redis]\nurl = \"redis://:${PASSWORD:-}@cache\"\n";

    27 Reference: "a `${…}` is malformed",
    "It names a variable, perhaps with a default, or a file. A literal `${` is written `$${`.",
    "[redis]\nurl = \"redis://${1st}\"\n" => "[redis]\nurl = \"${FIRST:-redis://cache}\"\n";

    28 MisplacedReference: "nothing fills in a `${…}` here",
    "Only [postgres], [redis] and [admin] take values from the environment. Rules are the same wherever they run, or \
     keys of one deployment would look like somebody else's in the next; what differs belongs in `prefix`. A placeholder \
     of a template has no `$`.",
    "[rule.feed]\ntable  = \"public.products\"\ndelete = [\"feed:${id}\"]\n"
    => "[rule.feed]\ntable  = \"public.products\"\ndelete = [\"feed:{id}\"]\n";

    30 Url: "this is no URL of the server",
    "Postgres: `postgresql://user@host:port/database`; a driver suffix as in `postgresql+asyncpg://` is dropped. Redis: \
     `redis://`, `rediss://` with TLS, `redis+unix://` for a socket.",
    "[redis]\nurl = \"http://cache\"\n" => "[redis]\nurl = \"redis://cache\"\n";

    31 PostgresName: "this is no name that Postgres takes",
    "Slots are named with lower-case letters, digits and `_`; slots and publications with at most 63 bytes.",
    "[postgres]\nurl  = \"postgresql://db\"\nslot = \"Keep-Step\"\n" => "[postgres]\nurl  = \"postgresql://db\"\nslot = \"keep_step\"\n";

    32 Listen: "this is no address to listen at",
    "An IP address with a port, or \"off\". Names are not looked up: which addresses they stand for can change.",
    "[admin]\nlisten = \"localhost:9847\"\n" => "[admin]\nlisten = \"127.0.0.1:9847\"\n";

    33 Prefixes: "prefixes cannot be told apart",
    "Keys under a prefix that begins with another one would count as keys under the other too, and be deleted with \
     them. At most eight prefixes are written besides the first.",
    "[redis]\nurl         = \"redis://cache\"\nprefix      = \"shop:\"\nalso_prefix = [\"shop:v1:\"]\n"
    => "[redis]\nurl         = \"redis://cache\"\nprefix      = \"shop:v2:\"\nalso_prefix = [\"shop:v1:\"]\n";

    34 NoTls: "certificates without TLS",
    "`ca_file`, `client_cert` and `client_key` do nothing on a connection that is not encrypted.",
    "[redis]\nurl     = \"redis://cache\"\nca_file = \"/etc/ssl/redis-ca.pem\"\n"
    => "[redis]\nurl     = \"rediss://cache\"\nca_file = \"/etc/ssl/redis-ca.pem\"\n";

    40 TableName: "this is no name of a table",
    "`schema.table`, exactly as in the catalog: what was made as `Products` without quotes is called `products` there. A \
     part that holds a dot stands in double quotes.",
    "[rule.feed]\ntable  = \"products\"\ndelete = [\"feed:global\"]\n"
    => "[rule.feed]\ntable  = \"public.products\"\ndelete = [\"feed:global\"]\n";

    41 NoPurpose: "the rule does nothing",
    "A rule writes rows to keys (`key`), makes keys stale (`delete`), or both.",
    "[rule.feed]\ntable = \"public.products\"\n"
    => "[rule.feed]\ntable  = \"public.products\"\ndelete = [\"feed:global\"]\n";

    42 ChangedWithoutUpdate: "`changed` has no effect without updates",
    "It says which UPDATEs count, and `on` leaves UPDATE out.",
    "[rule.feed]\ntable   = \"public.products\"\non      = [\"insert\"]\nchanged = [\"name\"]\ndelete  = [\"feed:global\"]\n"
    => "[rule.feed]\ntable   = \"public.products\"\non      = [\"insert\", \"update\"]\nchanged = [\"name\"]\ndelete  = [\"feed:global\"]\n";

    43 KeysStay: "keys of deleted rows stay for ever",
    "`on_delete = \"keep\"` leaves a deleted row's key to its TTL, and there is none.",
    "[rule.product]\ntable     = \"public.products\"\nkey       = \"product:{id}\"\nvalue     = \"json\"\ncolumns   = [\"*\"]\n\
     on_delete = \"keep\"\nwrite     = \"present\"\n"
    => "[rule.product]\ntable     = \"public.products\"\nkey       = \"product:{id}\"\nvalue     = \"json\"\ncolumns   = [\"*\"]\n\
        on_delete = \"keep\"\nwrite     = \"present\"\nttl       = \"1d\"\n";

    44 KeysGo: "keys of rows that do not change go",
    "A TTL counts from the last time that the key was written, and a row that does not change is not written again. \
     Without a TTL a key lives as long as its row. With `every` it is written again in time. With `write = \"present\"` applications fill what they miss.",
    "[rule.product]\ntable   = \"public.products\"\nkey     = \"product:{id}\"\nvalue   = \"json\"\ncolumns = [\"*\"]\nttl     = \"1d\"\n"
    => "[rule.product]\ntable   = \"public.products\"\nkey     = \"product:{id}\"\nvalue   = \"json\"\ncolumns = [\"*\"]\n";

    45 NotAmongColumns: "a column is not in the value",
    "`rename` and `strings` speak of columns that `columns` puts into the value.",
    "[rule.product]\ntable   = \"public.products\"\nkey     = \"product:{id}\"\nvalue   = \"json\"\ncolumns = [\"id\", \"name\"]\nstrings = [\"price\"]\n"
    => "[rule.product]\ntable   = \"public.products\"\nkey     = \"product:{id}\"\nvalue   = \"json\"\ncolumns = [\"id\", \"name\", \"price\"]\nstrings = [\"price\"]\n";

    46 StarAmongColumns: "`columns` names `*` beside others",
    "`[\"*\"]` is every published column already.",
    "[rule.product]\ntable   = \"public.products\"\nkey     = \"product:{id}\"\nvalue   = \"json\"\ncolumns = [\"*\", \"id\"]\n"
    => "[rule.product]\ntable   = \"public.products\"\nkey     = \"product:{id}\"\nvalue   = \"json\"\ncolumns = [\"*\"]\n";

    47 SameField: "two columns go into the same field",
    "A JSON object with a name twice means something else to each parser.",
    "[rule.product]\ntable   = \"public.products\"\nkey     = \"product:{id}\"\nvalue   = \"json\"\ncolumns = [\"id\", \"name\"]\nrename  = { id = \"name\" }\n"
    => "[rule.product]\ntable   = \"public.products\"\nkey     = \"product:{id}\"\nvalue   = \"json\"\ncolumns = [\"id\", \"name\"]\nrename  = { id = \"key\" }\n";

    48 UnusedVar: "no template uses this var",
    "It was misspelt in a template, where it now counts as a column, or it is left over.",
    "[rule.page]\ntable  = \"public.products\"\nvars   = { url = \"/p/{id}/\" }\ndelete = [\"page:{id}\"]\n"
    => "[rule.page]\ntable  = \"public.products\"\nvars   = { url = \"/p/{id}/\" }\ndelete = [\"page:{url|md5}\"]\n";

    49 Excluded: "a field means nothing here",
    "Each kind of value has fields of its own: `columns` is for `json`, `hash` and `rejson`, `template` for `string`, `member` for \
     `set` and `zset`. A set lives as long as it has members, so it takes no TTL; and a key has one TTL.",
    "[rule.product]\ntable    = \"public.products\"\nkey      = \"product:{id}\"\nvalue    = \"string\"\ntemplate = \"{name}\"\ncolumns  = [\"name\"]\n"
    => "[rule.product]\ntable    = \"public.products\"\nkey      = \"product:{id}\"\nvalue    = \"string\"\ntemplate = \"{name}\"\n";

    50 NoLiteral: "a key begins with row data",
    "What stands before the first placeholder is what makes a key the rule's own. Without it whoever writes rows would \
     choose which keys of the whole Redis are written and deleted.",
    "[rule.feed]\ntable  = \"public.products\"\ndelete = [\"{slug}\"]\n"
    => "[rule.feed]\ntable  = \"public.products\"\ndelete = [\"product:{slug}\"]\n";

    51 TemplateSyntax: "this is no template",
    "`{column}`, `{column?default}` for NULL, `{column|filter}`, `{column?default|filter}`; `{{` and `}}` are braces.",
    "[rule.feed]\ntable  = \"public.products\"\ndelete = [\"product:{id\"]\n"
    => "[rule.feed]\ntable  = \"public.products\"\ndelete = [\"product:{id}\"]\n";

    52 UnknownFilter: "there is no such filter",
    "Filters are `lower`, `upper`, `urlencode`, `md5` and `sha256`; several apply from left to right.",
    "[rule.feed]\ntable  = \"public.products\"\ndelete = [\"product:{slug|lowercase}\"]\n"
    => "[rule.feed]\ntable  = \"public.products\"\ndelete = [\"product:{slug|lower}\"]\n";

    53 ReservedKey: "a key is one of keepstep's own",
    "Behind the prefix, `keepstep:` begins the checkpoint and what lies beside it.",
    "[rule.feed]\ntable  = \"public.products\"\ndelete = [\"keepstep:{id}\"]\n"
    => "[rule.feed]\ntable  = \"public.products\"\ndelete = [\"product:{id}\"]\n";

    54 NestedVar: "a var uses another var",
    "Vars are filled in from columns only, so that there is no order in which they would have to be.",
    "CREATE TABLE products (id int PRIMARY KEY);\n\n[rule.page]\ntable  = \"public.products\"\n\
     vars   = { path = \"/p/{id}/\", url = \"https://shop.example{path}\" }\ndelete = [\"page:{url|md5}\", \"page:{path}\"]\n"
    => "CREATE TABLE products (id int PRIMARY KEY);\n\n[rule.page]\ntable  = \"public.products\"\n\
        vars   = { path = \"/p/{id}/\", url = \"https://shop.example/p/{id}/\" }\ndelete = [\"page:{url|md5}\", \"page:{path}\"]\n";

    55 Expression: "this is no expression",
    "Expressions have the syntax of CEL: `==` and not `=`, `&&` and not `AND`, texts in quotes of either kind. What keepstep does \
     not support of CEL is said at its place.",
    "[rule.product]\ntable   = \"public.products\"\nwhen    = \"row.id = 1\"\nkey     = \"product:{id}\"\nvalue   = \"json\"\ncolumns = [\"*\"]\n"
    => "[rule.product]\ntable   = \"public.products\"\nwhen    = \"row.id == 1\"\nkey     = \"product:{id}\"\nvalue   = \"json\"\ncolumns = [\"*\"]\n";

    56 Sql: "this is no single SQL statement",
    "A query stands without a `;`, and its parameters are named after what they stand for: `:department_id`. In literals, \
     quoted names and comments a `:` has no meaning, and `::` is a cast.",
    "[rule.faculty]\ntable  = \"public.faculty\"\nlookup = \"select code as dept from public.departments where id = $1\"\n\
     delete = [\"faculty:{dept}\"]\n"
    => "[rule.faculty]\ntable  = \"public.faculty\"\n\
        lookup = \"select code as dept from public.departments where id = :department_id\"\ndelete = [\"faculty:{dept}\"]\n";

    57 QueryKey: "a query's key does not say which result it holds",
    "The parameters of `sql` are the placeholders of `key`: what the key says of each must tell its values apart, or two \
     results would be written to one key, one over the other. So `sql` has no parameter that is not in the key, \
     neither `lower`, `upper` nor a default stands with it there, and where a text could look like what follows it, it has \
     `urlencode`. The templates of `params` may have any of them.",
    "[query.page]\nkey   = \"page:{category|lower}\"\nmode  = \"refresh\"\n\
     sql   = \"select count(*) from products where category = :category\"\nshape = \"value\"\n\
     [[query.page.on]]\ntable  = \"public.products\"\nparams = { category = \"{category}\" }\n"
    => "[query.page]\nkey   = \"page:{category}\"\nmode  = \"refresh\"\n\
        sql   = \"select count(*) from products where lower(category) = :category\"\nshape = \"value\"\n\
        [[query.page.on]]\ntable  = \"public.products\"\nparams = { category = \"{category|lower}\" }\n";

    59 TableVar: "a var has the name of what stands for the table",
    "`{_schema}`, `{_table}` and `{_pk}` stand in every template for the schema, the name and the primary key of the rule's table.",
    "[rule.product]\ntable  = \"shop_*.products\"\nvars   = { _schema = \"s:{id}\" }\ndelete = [\"product:{_schema}\"]\n"
    => "[rule.product]\ntable  = \"shop_*.products\"\nvars   = { short = \"s:{id}\" }\ndelete = [\"product:{short}\"]\n";

    60 UnknownColumn: "the table has no such column",
    "Names are exact as in the catalog: what was made as `categoryId` without quotes is called `categoryid` there.",
    "CREATE TABLE products (id int PRIMARY KEY, categoryId int);\n\n[rule.feed]\ntable   = \"public.products\"\n\
     changed = [\"categoryId\"]\ndelete  = [\"feed:global\"]\n"
    => "CREATE TABLE products (id int PRIMARY KEY, categoryId int);\n\n[rule.feed]\ntable   = \"public.products\"\n\
        changed = [\"categoryid\"]\ndelete  = [\"feed:global\"]\n";

    61 UnpublishedColumn: "the publication leaves a column out",
    "Postgres sends the columns that the publication lists, and no generated column before version 18 (later ones send \
     stored ones if `publish_generated_columns` says so).",
    "CREATE TABLE lines (id int PRIMARY KEY, qty int, total int GENERATED ALWAYS AS (qty * 2) STORED);\n\n\
     [rule.line]\ntable   = \"public.lines\"\nkey     = \"line:{id}\"\nvalue   = \"json\"\ncolumns = [\"id\", \"total\"]\n"
    => "CREATE TABLE lines (id int PRIMARY KEY, qty int, total int GENERATED ALWAYS AS (qty * 2) STORED);\n\n\
        [rule.line]\ntable   = \"public.lines\"\nkey     = \"line:{id}\"\nvalue   = \"json\"\ncolumns = [\"id\", \"qty\"]\n";

    62 SharedKey: "two rows can have the same key",
    "A written key must belong to one row, or whichever changed last would stand there, and a reconcile would find \
     either. So it holds the columns of a unique index that is valid, not partial and not deferrable, and they can be told \
     from it: no filter or default that makes different values equal, and where a text could look like what follows it, \
     `urlencode`. What many rows share is a list: let their changes `delete` it.",
    "CREATE TABLE products (id int PRIMARY KEY, category_id int);\n\n[rule.product]\ntable   = \"public.products\"\n\
     key     = \"product:{category_id}\"\nvalue   = \"json\"\ncolumns = [\"*\"]\non      = [\"insert\"]\n"
    => "CREATE TABLE products (id int PRIMARY KEY, category_id int);\n\n[rule.product]\ntable   = \"public.products\"\n\
        key     = \"product:{id}\"\nvalue   = \"json\"\ncolumns = [\"*\"]\n";

    63 KeyOfTwoRules: "two rules can write the same key",
    "Each would overwrite the other, and delete what it takes for a key without a row.",
    "CREATE TABLE products (id int PRIMARY KEY, sku text NOT NULL UNIQUE);\nALTER TABLE products REPLICA IDENTITY FULL;\n\n\
     [rule.by-id]\ntable   = \"public.products\"\nkey     = \"product:{id}\"\nvalue   = \"json\"\ncolumns = [\"*\"]\n\n\
     [rule.by-sku]\ntable   = \"public.products\"\nkey     = \"product:{sku}\"\nvalue   = \"json\"\ncolumns = [\"*\"]\n"
    => "CREATE TABLE products (id int PRIMARY KEY, sku text NOT NULL UNIQUE);\nALTER TABLE products REPLICA IDENTITY FULL;\n\n\
        [rule.by-id]\ntable   = \"public.products\"\nkey     = \"product:{id}\"\nvalue   = \"json\"\ncolumns = [\"*\"]\n\n\
        [rule.by-sku]\ntable   = \"public.products\"\nkey     = \"product-sku:{sku}\"\nvalue   = \"json\"\ncolumns = [\"*\"]\n";

    64 DeletesWritten: "a rule deletes keys that a rule writes",
    "A written key follows its row by itself. If another rule deleted it, it would stay away until its row changes.",
    "CREATE TABLE products (id int PRIMARY KEY);\n\n[rule.product]\ntable   = \"public.products\"\nkey     = \"product:{id}\"\n\
     value   = \"json\"\ncolumns = [\"*\"]\ndelete  = [\"product:{id}\"]\n"
    => "CREATE TABLE products (id int PRIMARY KEY);\n\n[rule.product]\ntable   = \"public.products\"\nkey     = \"product:{id}\"\n\
        value   = \"json\"\ncolumns = [\"*\"]\ndelete  = [\"page:product:{id}\"]\n";

    65 ExpressionType: "an expression does not fit its table",
    "Types come from the table: a text is not compared with a number, a condition is a bool, a score a number, `expire_at` a time. \
     The place inside the expression is underlined, and both types are named.",
    "CREATE TABLE products (id int PRIMARY KEY, name text);\n\n[rule.product]\ntable   = \"public.products\"\nwhen    = \"row.id == 'one'\"\nkey     = \"product:{id}\"\nvalue   = \"json\"\ncolumns = [\"*\"]\n"
    => "CREATE TABLE products (id int PRIMARY KEY, name text);\n\n[rule.product]\ntable   = \"public.products\"\nwhen    = \"row.id == 1\"\nkey     = \"product:{id}\"\nvalue   = \"json\"\ncolumns = [\"*\"]\n";

    66 Lookup: "a lookup does not give what the templates use",
    "A name in a template of a rule with `lookup` is a column of the rule's table or one of the query's result, and it must \
     be clear which. A lookup that no template uses is left over.",
    "CREATE TABLE departments (id int PRIMARY KEY, code text);\n\
     CREATE TABLE faculty (id int PRIMARY KEY, department_id int);\nALTER TABLE faculty REPLICA IDENTITY FULL;\n\n\
     [rule.faculty]\ntable  = \"public.faculty\"\n\
     lookup = \"select code from public.departments where id = :department_id\"\ndelete = [\"faculty:{dept}\"]\n"
    => "CREATE TABLE departments (id int PRIMARY KEY, code text);\n\
        CREATE TABLE faculty (id int PRIMARY KEY, department_id int);\nALTER TABLE faculty REPLICA IDENTITY FULL;\n\n\
        [rule.faculty]\ntable  = \"public.faculty\"\n\
        lookup = \"select code as dept from public.departments where id = :department_id\"\ndelete = [\"faculty:{dept}\"]\n";

    67 KeyOfTables: "rows of different tables would have the same key",
    "A rule whose table is a pattern writes keys for each table that matches. With `*` in the schema the key holds `{_schema}`, with \
     `*` in the name `{_table}`: then no two tables share a key, however many there will be.",
    "[rule.product]\ntable   = \"tenant_*.products\"\nkey     = \"product:{id}\"\nvalue   = \"json\"\ncolumns = [\"*\"]\n"
    => "[rule.product]\ntable   = \"tenant_*.products\"\nkey     = \"{_schema}:product:{id}\"\nvalue   = \"json\"\ncolumns = [\"*\"]\n";

    68 NoPrimaryKey: "`{_pk}` where there is no primary key",
    "`{_pk}` stands for the columns of the table's primary key, with `:` between them. A unique index is none.",
    "CREATE TABLE products (id int UNIQUE NOT NULL);\nALTER TABLE products REPLICA IDENTITY FULL;\n\n\
     [rule.product]\ntable  = \"public.products\"\ndelete = [\"product:{_pk}\"]\n"
    => "CREATE TABLE products (id int PRIMARY KEY);\n\n[rule.product]\ntable  = \"public.products\"\ndelete = [\"product:{_pk}\"]\n";

    70 NoReplicaIdentity: "the table has no replica identity",
    "It says which columns of an old row Postgres puts into the log. Without any it refuses UPDATE and DELETE as soon as \
     the table is published, so keepstep does not publish it.",
    "CREATE TABLE visits (page text);\n\n[rule.visits]\ntable  = \"public.visits\"\ndelete = [\"visits:all\"]\n"
    => "CREATE TABLE visits (page text);\nALTER TABLE visits REPLICA IDENTITY FULL;\n\n\
        [rule.visits]\ntable  = \"public.visits\"\ndelete = [\"visits:all\"]\n";

    71 HiddenIdentity: "the publication leaves out a part of the replica identity",
    "Postgres then refuses every UPDATE and DELETE of the table: whoever receives the change could not tell which row it \
     is about. Publish those columns, or every column.",
    "" => "";

    72 NotInIdentity: "the log does not hold a column of the old row",
    "To delete the key of a row that is gone, or of the value that a row had, keepstep must see the old row. Of that Postgres \
     sends only what the replica identity names: the primary key (DEFAULT), a unique index (USING INDEX), or all (FULL).",
    "CREATE TABLE order_lines (id bigint PRIMARY KEY, order_id bigint);\n\n[rule.order-lines]\ntable  = \"public.order_lines\"\n\
     delete = [\"order:{order_id}:lines\"]\n"
    => "CREATE TABLE order_lines (id bigint PRIMARY KEY, order_id bigint);\nALTER TABLE order_lines REPLICA IDENTITY FULL;\n\n\
        [rule.order-lines]\ntable  = \"public.order_lines\"\ndelete = [\"order:{order_id}:lines\"]\n";

    73 WeakPartitions: "partitions log less than their table says",
    "REPLICA IDENTITY of a partitioned table is not inherited: what counts for a row is the partition that it lies in, \
     while the stream describes it as one of the whole table. A column that was not logged would then look like NULL.",
    "CREATE TABLE visits (id int PRIMARY KEY, page text) PARTITION BY RANGE (id);\n\
     CREATE TABLE visits_1 PARTITION OF visits FOR VALUES FROM (0) TO (1000);\nALTER TABLE visits REPLICA IDENTITY FULL;\n\n\
     [rule.visits]\ntable  = \"public.visits\"\ndelete = [\"page:{page}\"]\n"
    => "CREATE TABLE visits (id int PRIMARY KEY, page text) PARTITION BY RANGE (id);\n\
        CREATE TABLE visits_1 PARTITION OF visits FOR VALUES FROM (0) TO (1000);\nALTER TABLE visits REPLICA IDENTITY FULL;\n\
        ALTER TABLE visits_1 REPLICA IDENTITY FULL;\n\n\
        [rule.visits]\ntable  = \"public.visits\"\ndelete = [\"page:{page}\"]\n";

    74 OldKeyStays: "an UPDATE can leave the old key behind",
    "`on` leaves DELETE out, so the rule may use columns that Postgres does not send of the old row. When an UPDATE changes \
     one of them, the key that was is not known.",
    "CREATE TABLE products (id int PRIMARY KEY, category_id int);\n\n[rule.lists]\ntable  = \"public.products\"\n\
     on     = [\"insert\", \"update\"]\ndelete = [\"list:{category_id}\"]\n"
    => "CREATE TABLE products (id int PRIMARY KEY, category_id int);\nALTER TABLE products REPLICA IDENTITY FULL;\n\n\
        [rule.lists]\ntable  = \"public.products\"\non     = [\"insert\", \"update\"]\ndelete = [\"list:{category_id}\"]\n";

    80 NoPublication: "the publication does not exist",
    "`keepstep setup` makes it, and the slot; with `--print` it shows the SQL for somebody with more privileges.",
    "CREATE TABLE products (id int PRIMARY KEY);\n-- no PUBLICATION\n\n\
     [rule.feed]\ntable  = \"public.products\"\ndelete = [\"feed:global\"]\n"
    => "CREATE TABLE products (id int PRIMARY KEY);\nCREATE PUBLICATION keepstep FOR TABLE products;\n\n\
        [rule.feed]\ntable  = \"public.products\"\ndelete = [\"feed:global\"]\n";

    81 NoTable: "the table does not exist",
    "It is looked for under exactly this name, in the database that `url` of [postgres] names.",
    "CREATE TABLE \"Products\" (id int PRIMARY KEY);\n\n[rule.feed]\ntable  = \"public.products\"\ndelete = [\"feed:global\"]\n"
    => "CREATE TABLE \"Products\" (id int PRIMARY KEY);\n\n[rule.feed]\ntable  = \"public.Products\"\ndelete = [\"feed:global\"]\n";

    82 Unpublishable: "changes of this are not in the log",
    "Views, materialized views and foreign tables have no rows of their own, and those of unlogged and temporary tables \
     are not logged. A rule names the tables that a view reads from.",
    "CREATE UNLOGGED TABLE sessions (id int PRIMARY KEY);\n\n[rule.session]\ntable  = \"public.sessions\"\ndelete = [\"session:{id}\"]\n"
    => "CREATE UNLOGGED TABLE sessions (id int PRIMARY KEY);\nALTER TABLE sessions SET LOGGED;\n\n\
        [rule.session]\ntable  = \"public.sessions\"\ndelete = [\"session:{id}\"]\n";

    83 Unpublished: "the publication does not send this table",
    "It is not in the publication, or comes under another name: with `publish_via_partition_root` changes of partitions come \
     as those of the whole table, without it those of the whole table come as its partitions'.",
    "CREATE TABLE products (id int PRIMARY KEY);\nCREATE PUBLICATION keepstep;\n\n\
     [rule.feed]\ntable  = \"public.products\"\ndelete = [\"feed:global\"]\n"
    => "CREATE TABLE products (id int PRIMARY KEY);\nCREATE PUBLICATION keepstep FOR TABLE products;\n\n\
        [rule.feed]\ntable  = \"public.products\"\ndelete = [\"feed:global\"]\n";

    84 UnpublishedOperation: "the publication leaves an operation out",
    "`publish` of a publication can leave out insert, update, delete or truncate; then the rule never hears of them. TRUNCATE \
     counts where DELETE does.",
    "CREATE TABLE products (id int PRIMARY KEY);\nCREATE PUBLICATION keepstep FOR TABLE products WITH (publish = 'insert');\n\n\
     [rule.feed]\ntable  = \"public.products\"\ndelete = [\"feed:global\"]\n"
    => "CREATE TABLE products (id int PRIMARY KEY);\nCREATE PUBLICATION keepstep FOR TABLE products WITH (publish = 'insert');\n\n\
        [rule.feed]\ntable  = \"public.products\"\non     = [\"insert\"]\ndelete = [\"feed:global\"]\n";

    85 QueryRefused: "Postgres refuses a query",
    "Each query of the rules file is prepared when keepstep starts, with parameters of their columns' types. The message is \
     Postgres's own, at the place that it names. Only what reads can be run: SELECT, VALUES, TABLE or WITH.",
    "CREATE TABLE departments (id int PRIMARY KEY, code text);\n\
     CREATE TABLE faculty (id int PRIMARY KEY, department_id int);\nALTER TABLE faculty REPLICA IDENTITY FULL;\n\n\
     [rule.faculty]\ntable  = \"public.faculty\"\n\
     lookup = \"select kode as dept from public.departments where id = :department_id\"\ndelete = [\"faculty:{dept}\"]\n"
    => "CREATE TABLE departments (id int PRIMARY KEY, code text);\n\
        CREATE TABLE faculty (id int PRIMARY KEY, department_id int);\nALTER TABLE faculty REPLICA IDENTITY FULL;\n\n\
        [rule.faculty]\ntable  = \"public.faculty\"\n\
        lookup = \"select code as dept from public.departments where id = :department_id\"\ndelete = [\"faculty:{dept}\"]\n";

    86 QueryShape: "the result of a query has not the shape that is written",
    "With `shape = \"value\"` the key holds one column of one row. `\"row\"` writes a JSON object of all columns, `\"rows\"` an array \
     of these.",
    "CREATE TABLE products (id int PRIMARY KEY, category_id int, price numeric);\n\
     ALTER TABLE products REPLICA IDENTITY FULL;\n\n\
     [query.count]\nkey   = \"count:{category}\"\nmode  = \"refresh\"\nshape = \"value\"\n\
     sql   = \"select count(*), sum(price) from products where category_id = :category\"\n\
     [[query.count.on]]\ntable  = \"public.products\"\nparams = { category = \"{category_id}\" }\n"
    => "CREATE TABLE products (id int PRIMARY KEY, category_id int, price numeric);\n\
        ALTER TABLE products REPLICA IDENTITY FULL;\n\n\
        [query.count]\nkey   = \"count:{category}\"\nmode  = \"refresh\"\nshape = \"row\"\n\
        sql   = \"select count(*), sum(price) from products where category_id = :category\"\n\
        [[query.count.on]]\ntable  = \"public.products\"\nparams = { category = \"{category_id}\" }\n";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_told_by_their_number() {
        let numbers: Vec<u16> = CODES.iter().map(|known| known.code.number()).collect();
        assert!(numbers.is_sorted_by(|a, b| a < b), "{numbers:?}");
        for known in CODES {
            assert_eq!(Code::parse(&known.code.to_string()), Some(known.code));
            assert_eq!(known.wrong.is_empty(), known.right.is_empty(), "{}", known.code);
            assert!(known.text.ends_with('.') && !known.title.ends_with('.'), "{}", known.code);
        }
        assert_eq!((Code::parse("ks2"), Code::parse("2")), (Some(Code::NotToml), Some(Code::NotToml)));
        for other in ["", "KS", "KS000", "KS99999", "K2", "é2"] {
            assert_eq!(Code::parse(other), None, "{other}");
        }
    }
}

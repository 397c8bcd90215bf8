//! How `row_to_json` shows each type, from the catalog.
//!
//! The built-in types are known beforehand, so a database without types of its own is asked nothing. Enums, domains,
//! arrays, composites and extensions' types are looked up by one query however deep they nest. A type that neither
//! knows shows as its text form, quoted.

use std::collections::HashMap;
use std::sync::Arc;

use tokio_postgres::types::{Kind, Type};

use crate::error::{Error, ErrorKind};

/// How deep types may lie in each other: far beyond sense, well within the stack.
pub const TYPE_DEPTH_MAX: usize = 32;

/// What `row_to_json` makes of a type's text form (`json_categorize_type` in `src/backend/utils/adt/jsonfuncs.c`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JsonType {
    /// `true` or `false`.
    Bool,
    /// A number, quoted where JSON has none for it (NaN, Infinity).
    Number,
    /// `date`: as it is, quoted.
    Date,
    /// `timestamp`: with a `T`.
    Timestamp,
    /// `timestamptz`: with a `T` and a full offset.
    TimestampTz,
    /// `json` and `jsonb`: as they are.
    Json,
    /// An array, nested to any depth.
    Array {
        /// Its elements.
        element: Arc<JsonType>,
        /// What separates them, `,` for every type but `box`.
        delimiter: u8,
    },
    /// `int2vector` and `oidvector`: space-separated.
    Vector(Arc<JsonType>),
    /// A composite type's attributes, dropped ones left out.
    Composite(Vec<(String, Arc<JsonType>)>),
    /// `hstore`: an object of strings.
    Hstore,
    /// Everything else: its text form, quoted.
    Text,
}

/// What is known of a type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TypeInfo {
    /// How `row_to_json` shows it.
    pub json: Arc<JsonType>,
    /// The OID of the type it is a domain over, through domains over domains; its own if it is none.
    pub base: u32,
    /// Its name for people: as in `pg_type`, and `int4[]` for an array.
    pub name: String,
}

/// Types by OID.
#[derive(Clone, Debug)]
pub struct Types {
    known: HashMap<u32, TypeInfo>,
    unknown: TypeInfo,
}

impl Types {
    /// The scalar, range and array types that every Postgres has; needs no database.
    pub fn builtin() -> Self {
        /// OIDs assigned by hand end here (`FirstGenbkiObjectId` in `src/include/access/transam.h`).
        const FIRST_GENERATED_OID: u32 = 10_000;
        let types = (1..FIRST_GENERATED_OID).filter_map(Type::from_oid);
        Types {
            known: types.filter_map(|ty| Some((ty.oid(), builtin_info(&ty)?))).collect(),
            unknown: TypeInfo { json: Arc::new(JsonType::Text), base: 0, name: "unknown type".to_owned() },
        }
    }

    /// The built-in types, and those of these OIDs as the catalog has them now.
    ///
    /// A composite type may change while a relation that uses it does not, so whoever binds a relation anew loads
    /// its types anew.
    pub async fn load(client: &tokio_postgres::Client, oids: &[u32]) -> Result<Self, Error> {
        let mut types = Self::builtin();
        types.extend(client, oids).await?;
        Ok(types)
    }

    /// Adds the types of these OIDs that are not known yet, with everything they consist of.
    pub async fn extend(&mut self, client: &tokio_postgres::Client, oids: &[u32]) -> Result<(), Error> {
        let missing: Vec<u32> = oids.iter().copied().filter(|oid| !self.known.contains_key(oid)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let entries = read_catalog(client, &missing).await?;
        for &oid in &missing {
            self.resolve(oid, &entries, 0)?;
        }
        Ok(())
    }

    /// What is known of a type; one that is not shows as text, and its base is 0.
    pub fn get(&self, oid: u32) -> &TypeInfo {
        self.known.get(&oid).unwrap_or(&self.unknown)
    }

    /// Builds what is known of a type from its catalog entry, innermost first.
    fn resolve(&mut self, oid: u32, entries: &HashMap<u32, Entry>, depth: usize) -> Result<TypeInfo, Error> {
        if depth > TYPE_DEPTH_MAX {
            let message = format!("a column's type nests more than {TYPE_DEPTH_MAX} types");
            return Err(Error::new(ErrorKind::Config, message));
        }
        if let Some(info) = self.known.get(&oid) {
            return Ok(info.clone());
        }
        let Some(entry) = entries.get(&oid) else {
            return Ok(self.unknown.clone());
        };
        let own = |json| TypeInfo { json: Arc::new(json), base: oid, name: entry.name.clone() };
        let info = match &entry.form {
            Form::Domain { over } => TypeInfo { name: entry.name.clone(), ..self.resolve(*over, entries, depth + 1)? },
            &Form::Array { element, delimiter } => {
                let element = self.resolve(element, entries, depth + 1)?;
                let json = Arc::new(JsonType::Array { element: element.json, delimiter });
                TypeInfo { json, base: oid, name: format!("{}[]", element.name) }
            }
            Form::Composite { attributes } => {
                let mut resolved = Vec::with_capacity(attributes.len());
                for (name, attribute) in attributes {
                    resolved.push((name.clone(), self.resolve(*attribute, entries, depth + 1)?.json));
                }
                own(JsonType::Composite(resolved))
            }
            Form::Hstore => own(JsonType::Hstore),
            Form::Scalar => own(JsonType::Text),
        };
        self.known.insert(oid, info.clone());
        Ok(info)
    }
}

/// A type that every Postgres has; `None` for the pseudo-types, which no column has.
fn builtin_info(ty: &Type) -> Option<TypeInfo> {
    let (json, name) = match (ty, ty.kind()) {
        (_, Kind::Pseudo) => return None,
        // Declared as arrays in the catalog, but with an output function of their own.
        (&Type::INT2_VECTOR | &Type::OID_VECTOR, Kind::Array(element)) => {
            (JsonType::Vector(builtin_info(element)?.json), ty.name().to_owned())
        }
        (_, Kind::Array(element)) => {
            let delimiter = if *element == Type::BOX { b';' } else { b',' };
            let element = builtin_info(element)?;
            (JsonType::Array { element: element.json, delimiter }, format!("{}[]", element.name))
        }
        _ => (builtin_scalar(ty), ty.name().to_owned()),
    };
    Some(TypeInfo { json: Arc::new(json), base: ty.oid(), name })
}

fn builtin_scalar(ty: &Type) -> JsonType {
    match *ty {
        Type::BOOL => JsonType::Bool,
        Type::INT2 | Type::INT4 | Type::INT8 | Type::FLOAT4 | Type::FLOAT8 | Type::NUMERIC => JsonType::Number,
        Type::DATE => JsonType::Date,
        Type::TIMESTAMP => JsonType::Timestamp,
        Type::TIMESTAMPTZ => JsonType::TimestampTz,
        Type::JSON | Type::JSONB => JsonType::Json,
        _ => JsonType::Text,
    }
}

/// A type as the catalog describes it.
struct Entry {
    name: String,
    form: Form,
}

enum Form {
    Domain { over: u32 },
    Array { element: u32, delimiter: u8 },
    Composite { attributes: Vec<(String, u32)> },
    Hstore,
    Scalar,
}

/// The types asked for and everything they consist of. What a "true" array is says `IsTrueArrayType` in
/// `src/include/catalog/pg_type.h`; of the casts to json only hstore's is known here, by the function it calls.
const CATALOG_QUERY: &str = "\
with recursive part(oid) as (
    select pg_catalog.unnest($1)
  union
    select inner_type.oid
      from part
      join pg_catalog.pg_type outer_type on outer_type.oid = part.oid
      cross join lateral (
          select outer_type.typbasetype where outer_type.typtype = 'd'
          union all
          select outer_type.typelem
           where outer_type.typsubscript = 'pg_catalog.array_subscript_handler'::pg_catalog.regproc
          union all
          select atttypid from pg_catalog.pg_attribute
           where attrelid = outer_type.typrelid and attnum > 0 and not attisdropped
      ) inner_type(oid)
)
select t.oid,
       t.typname::text,
       case when t.typtype = 'd' then t.typbasetype end,
       case when t.typsubscript = 'pg_catalog.array_subscript_handler'::pg_catalog.regproc then t.typelem end,
       (select e.typdelim::text from pg_catalog.pg_type e where e.oid = t.typelem),
       t.typtype = 'c',
       array(select attname::text from pg_catalog.pg_attribute
              where attrelid = t.typrelid and attnum > 0 and not attisdropped order by attnum),
       array(select atttypid from pg_catalog.pg_attribute
              where attrelid = t.typrelid and attnum > 0 and not attisdropped order by attnum),
       exists (select from pg_catalog.pg_cast join pg_catalog.pg_proc on pg_proc.oid = castfunc
                where castsource = t.oid and casttarget = 'pg_catalog.json'::pg_catalog.regtype
                  and prosrc = 'hstore_to_json')
  from part
  join pg_catalog.pg_type t using (oid)";

async fn read_catalog(client: &tokio_postgres::Client, oids: &[u32]) -> Result<HashMap<u32, Entry>, Error> {
    let rows = client
        .query_typed(CATALOG_QUERY, &[(&oids, Type::OID_ARRAY)])
        .await
        .and_then(|rows| rows.iter().map(|row| Ok((row.try_get(0)?, Entry::from_row(row)?))).collect());
    rows.map_err(|error: tokio_postgres::Error| {
        // Every role may read these tables, so a failure is the server's state and not ours.
        Error::new(ErrorKind::PostgresAway, "cannot read the columns' types from the catalog").because(error)
    })
}

impl Entry {
    fn from_row(row: &tokio_postgres::Row) -> Result<Self, tokio_postgres::Error> {
        let domain: Option<u32> = row.try_get(2)?;
        let element: Option<u32> = row.try_get(3)?;
        let delimiter: Option<String> = row.try_get(4)?;
        let (composite, hstore) = (row.try_get(5)?, row.try_get(8)?);
        let form = match (domain, element) {
            (Some(over), _) => Form::Domain { over },
            (None, Some(element)) => {
                Form::Array { element, delimiter: delimiter.and_then(|text| text.bytes().next()).unwrap_or(b',') }
            }
            (None, None) if composite => {
                let (names, types): (Vec<String>, Vec<u32>) = (row.try_get(6)?, row.try_get(7)?);
                Form::Composite { attributes: names.into_iter().zip(types).collect() }
            }
            (None, None) if hstore => Form::Hstore,
            (None, None) => Form::Scalar,
        };
        Ok(Entry { name: row.try_get(1)?, form })
    }
}

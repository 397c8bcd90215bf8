//! Whole pipelines, each with the rules file that it becomes and what is said of it.

use super::translate;

const CONFIG: &str = "
sources:
  shop:
    type: cdc
    connection:
      type: postgresql
      host: db
      password: ${SOURCE_DB_PASSWORD}
    tables:
      public.customer:
        columns: [id, name, email, password]
      public.session:
        keys:
          - token
targets:
  target:
    connection:
      type: redis
      host: cache
processors:
  target_data_type: hash
";

/// The rules file and the remarks of these jobs.
fn shown(config: Option<&str>, jobs: &[&str]) -> String {
    let jobs: Vec<_> =
        jobs.iter().zip(1..).map(|(job, number)| (format!("jobs/{number}.yaml"), (*job).to_owned())).collect();
    let (rules, remarks) = translate(config, &jobs);
    let remarks: String = remarks.iter().map(|remark| format!("{remark}\n")).collect();
    let (_, rules) = rules.split_once("${REDIS_URL}\"\n").unwrap_or_default();
    format!("{remarks}~~~{rules}")
}

#[test]
fn each_kind_of_value() {
    let output = |kind: &str, key: &str, rest: &str| {
        format!(
            "source:\n  schema: public\n  table: invoice\noutput:\n  - uses: redis.write\n    with:\n      connection: target\n      \
             data_type: {kind}\n      key:\n        expression: {key}\n        language: jmespath\n{rest}"
        )
    };
    let jobs = [
        output("hash", "concat(['invoice_id:', InvoiceId])", "      expire: 100\n"),
        output(
            "json",
            "concat(['invoice_id:', InvoiceId])",
            "      mapping:\n        - InvoiceId: id\n        - Total\n",
        ),
        output(
            "set",
            "concat(['invoices:', BillingCountry])",
            "      args:\n        member: InvoiceId\n      expire: 100\n",
        ),
        output("sorted_set", "\"`invoices:sorted`\"", "      args:\n        score: Total\n        member: InvoiceId\n"),
        output("string", "concat(['AlbumTitle:', albumid])", "      args:\n        value: title\n      expire: 0\n"),
        output("stream", "\"`invoice:events`\"", "      mapping:\n        - InvoiceId: message_id\n"),
    ];
    insta::assert_snapshot!(shown(None, &jobs.each_ref().map(String::as_str)));
}

#[test]
fn steps_that_change_the_row() {
    let job = "
name: customers
source:
  schema: public
  table: customer
transform:
  - uses: rename_field
    with:
      from_field: name
      to_field: full_name
  - uses: add_field
    with:
      fields:
        - field: label
          language: sql
          expression: full_name || ' <' || lower(email) || '>'
        - field: app
          language: jmespath
          expression: '`shop`'
  - uses: remove_field
    with:
      field: password
  - uses: filter
    with:
      language: sql
      expression: deleted IS NULL AND country IN ('UK', 'DE')
  - uses: filter
    with:
      language: jmespath
      expression: age > `20`
output:
  - uses: redis.write
    with:
      key:
        expression: concat(['customer:', id])
        language: jmespath
  - uses: redis.write
    with:
      data_type: string
      key:
        expression: \"'label:' || id\"
        language: sql
      args:
        value: label
";
    insta::assert_snapshot!(shown(Some(CONFIG), &[job]));
}

#[test]
fn full_rows_and_keys_of_the_configuration() {
    let full = "
source:
  schema: public
  table: addresses
  row_format: full
transform:
  - uses: add_field
    with:
      field: after.city_state
      expression: concat([after.city, ', ', after.state])
      language: jmespath
output:
  - uses: redis.write
    with:
      data_type: hash
      key:
        expression: concat(['addresses:', after.id || before.id])
        language: jmespath
";
    let keyless = "
source: { schema: public, table: session }
output:
  - uses: redis.write
    with: { data_type: hash }
";
    insta::assert_snapshot!(shown(Some(CONFIG), &[full, keyless]));
}

#[test]
fn what_cannot_be_translated_is_said_with_its_line() {
    let config = "
sources:
  shop:
    connection:
      type: mysql
    tables:
      emp: {}
  other: {}
targets:
  target: {}
  second: {}
processors:
  json_update_strategy: merge
";
    let jobs = [
        "source:\n  table: \"*\"\noutput:\n  - uses: redis.write\n",
        "
source:
  table: emp
transform:
  - uses: map
    with:
      language: jmespath
      expression: '{a: b}'
  - uses: redis.lookup
    with:
      cmd: HGET
      field: artist
  - uses: explode
  - uses: add_field
    with:
      field: half
      language: sql
      expression: salary / 2
output:
  - uses: redis.write
    with:
      data_type: json
      on_update: merge
      key:
        language: jmespath
        expression: concat(['emp:', id])
      mapping: [half, artist, id: path.to.id]
      expire:
        expression: ttl
        language: jmespath
  - uses: redis.write
    with:
      nest: {}
  - uses: redis.write
    with: {}
  - uses: redis.write
    with:
      key: { language: jmespath, expression: 'values(key)[0]' }
  - uses: relational.write
",
        "
source: { schema: public, table: secret }
transform:
  - uses: remove_field
    with:
      fields: [{ field: pin }]
  - uses: filter
    with: { language: sql, expression: \"CASE WHEN a THEN b END\" }
output:
  - uses: redis.write
    with:
      key: { language: sql, expression: \"'secret:' || id\" }
      data_type: hash
",
        "source: [1\n",
        "output: []\n",
        "source: { schema: public, table: t }\n",
    ];
    insta::assert_snapshot!(shown(Some(config), &jobs));
}

#[test]
fn a_stream_that_would_hold_more_than_the_job_wrote_is_no_rule_yet() {
    let job = |table: &str, transform: &str, rest: &str| {
        format!(
            "source: {{ schema: public, table: {table} }}\n{transform}output:\n  - uses: redis.write\n    with:\n      data_type: stream\n      \
             key: {{ language: jmespath, expression: '`events`' }}\n{rest}"
        )
    };
    let removed = "transform:\n  - uses: remove_field\n    with: { field: ssn }\n";
    let jobs = [
        job("person", removed, ""),
        job("customer", "", ""),
        job("item", "", "      mapping: [id]\n"),
        job("open", "", ""),
    ];
    insta::assert_snapshot!(shown(Some(CONFIG), &jobs.each_ref().map(String::as_str)));
}

#[test]
fn what_a_row_was_before_is_no_condition() {
    let job = "
source: { schema: public, table: orders, row_format: full }
transform:
  - uses: filter
    with: { language: jmespath, expression: after.status != before.status }
output:
  - uses: redis.write
    with:
      data_type: json
      key: { language: jmespath, expression: \"concat(['order:', before.id || after.id])\" }
";
    insta::assert_snapshot!(shown(None, &[job]));
}

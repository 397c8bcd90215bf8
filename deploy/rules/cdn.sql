create table articles (
    id    int primary key,
    slug  text not null unique,
    title text not null
);
-- The old row, and with it the old slug, stands in the stream as `before`.
alter table articles replica identity full;

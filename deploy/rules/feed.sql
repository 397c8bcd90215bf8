create table posts (
    id           bigint primary key,
    author_id    int not null,
    title        text not null,
    hidden       boolean not null default false,
    published_at timestamptz
);
-- A post that gets another author must leave the feed of the one it had.
alter table posts replica identity full;

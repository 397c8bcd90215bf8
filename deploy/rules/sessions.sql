create table sessions (
    token      text primary key,
    user_id    int not null,
    roles      text[] not null default '{}',
    expires_at timestamptz not null,
    revoked_at timestamptz
);
-- To tell the user of a deleted session.
alter table sessions replica identity full;

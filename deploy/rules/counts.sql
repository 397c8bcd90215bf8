create table tickets (
    id       bigint primary key,
    team_id  int not null,
    status   text not null default 'new',
    priority int not null default 0
);
-- A ticket that is handed over must leave the set of the team it had.
alter table tickets replica identity full;

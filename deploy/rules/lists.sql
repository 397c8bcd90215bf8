create table faculty (
    id            int primary key,
    org_id        int not null,
    department_id int not null,
    name          text not null,
    title         text
);
-- A row that moves to another tenant must clear the lists of the one it had.
alter table faculty replica identity full;

create schema tenant_acme;
create schema tenant_umbrella;
create table tenant_acme.documents (id int primary key, folder_id int not null, title text not null);
create table tenant_umbrella.documents (like tenant_acme.documents including all);
-- A document that moves to another folder must clear the one that it was in.
alter table tenant_acme.documents replica identity full;
alter table tenant_umbrella.documents replica identity full;

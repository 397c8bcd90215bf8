create table products (
    id          int primary key,
    category_id int not null,
    name        text not null,
    price       numeric(10, 2) not null
);
-- A product that moves makes new pages of the category that it had too.
alter table products replica identity full;

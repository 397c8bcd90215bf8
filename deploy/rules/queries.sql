create table categories (id int primary key, name text not null);
create table sellers (id int primary key, name text not null);
create table products (
    id          int primary key,
    category_id int not null references categories,
    seller_id   int not null references sellers,
    name        text not null,
    price       numeric(10, 2) not null,
    rank        int not null default 0,
    active      boolean not null default true
);
-- A product that moves makes the page of the category that it had stale too.
alter table products replica identity full;

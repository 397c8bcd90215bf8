-- A small shop, for `keepstep demo`, the compose file and the tutorial.

create table categories (
    id   int primary key,
    name text not null
);

create table products (
    id          int primary key,
    name        text not null,
    price       numeric(10, 2) not null,
    category_id int not null references categories,
    attributes  jsonb not null default '{}',
    updated_at  timestamptz not null default now()
);

create table customers (
    id    int primary key,
    email text not null unique,
    name  text
);

create table orders (
    id          int primary key,
    customer_id int not null references customers,
    status      text not null default 'open',
    total       numeric(10, 2) not null,
    placed_at   timestamptz not null default now()
);

-- The rules make keys of columns outside the primary key (category_id, customer_id, email). To remove the key that an old
-- row had, Postgres must send the whole old row.
alter table products  replica identity full;
alter table customers replica identity full;
alter table orders    replica identity full;

insert into categories values (1, 'Books'), (2, 'Games'), (3, 'Music');
insert into products (id, name, price, category_id, attributes) values
    (1, 'The Art of Waiting', 12.00, 1, '{"pages": 320}'),
    (2, 'Chess Set',          39.90, 2, '{"pieces": 32}'),
    (3, 'Nocturnes',          15.50, 3, '{"discs": 2}');
insert into customers values (1, 'ada@example.com', 'Ada'), (2, 'bob@example.com', null);
insert into orders (id, customer_id, total) values (1, 1, 12.00), (2, 2, 55.40);

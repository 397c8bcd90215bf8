create table products (
    id         bigint primary key,
    name       varchar not null,
    price      numeric(10, 2) not null,
    created_at timestamp(6) not null default now(),
    updated_at timestamp(6) not null default now()
);

-- As `manage.py migrate` makes it of class Product(models.Model) in an app `shop`.
create table shop_product (
    id          bigint primary key,
    name        varchar(200) not null,
    price       numeric(10, 2) not null,
    category_id bigint not null
);

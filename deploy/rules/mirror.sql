create table invoice (
    id       int primary key,
    customer text not null,
    total    numeric(10, 2)
);
create table invoice_line (
    invoice_id int,
    line       int,
    item       text not null,
    qty        int not null,
    primary key (invoice_id, line)
);

create table players (
    id      int primary key,
    name    text not null,
    country text
);
create table scores (
    season    int,
    player_id int,
    points    bigint not null default 0,
    primary key (season, player_id)
);

#include "worker/gateway/worker_link.h"

#include <criterion/criterion.h>
#include <string.h>

struct listener {
    struct worker_link_sessions *link;
    struct hop_session_id id;
    uint32_t event_count;
    uint32_t broken_count;
    uint32_t last_position;
    int join_again; /* when broken */
    int leave_on_event;
};

static void on_event(void *user, const struct worker_link_event *event);
static void on_broken(void *user, const char *text);
static const struct worker_link_handler handler = {on_event, on_broken};

static void on_event(void *user, const struct worker_link_event *event)
{
    struct listener *self = user;
    cr_assert_eq(memcmp(&event->session_id, &self->id, sizeof self->id), 0);
    self->event_count++;
    self->last_position = event->token.position;
    if (self->leave_on_event)
        worker_link_leave(self->link, &self->id);
}

static void on_broken(void *user, const char *text)
{
    struct listener *self = user;
    cr_assert_str_eq(text, "gone");
    self->broken_count++;
    if (self->join_again)
        cr_assert_eq(worker_link_join(self->link, &self->id, &handler, self), ODSI_OK);
}

static void set_up(struct listener *listeners, uint32_t count, struct worker_link_sessions **link)
{
    cr_assert_eq(worker_link_open(link), ODSI_OK);
    memset(listeners, 0, count * sizeof *listeners);
    for (uint32_t i = 0; i < count; i++) {
        listeners[i].link = *link;
        listeners[i].id.bytes[0] = (uint8_t)(i / 2); /* some share a bucket */
        listeners[i].id.bytes[15] = (uint8_t)i;
        cr_assert_eq(worker_link_join(*link, &listeners[i].id, &handler, &listeners[i]), ODSI_OK);
    }
}

Test(worker_link, tells_each_session_its_own_events)
{
    struct worker_link_sessions *link = NULL;
    struct listener listeners[20];
    set_up(listeners, 20, &link);
    cr_expect_eq(worker_link_join(link, &listeners[3].id, &handler, NULL), ODSI_ERR_EXISTS);
    for (uint32_t i = 0; i < 20; i++) {
        const struct worker_link_event event = {.kind = WORKER_LINK_TOKEN,
                                                .session_id = listeners[i].id,
                                                .token = {.position = 100 + i}};
        cr_expect_eq(worker_link_dispatch(link, &event), 1);
    }
    for (uint32_t i = 0; i < 20; i++) {
        cr_expect_eq(listeners[i].event_count, 1);
        cr_expect_eq(listeners[i].last_position, 100 + i);
        worker_link_leave(link, &listeners[i].id);
        worker_link_leave(link, &listeners[i].id);
    }
    cr_expect_eq(worker_link_count(link), 0);
    worker_link_close(&link);
    cr_expect_null(link);
}

Test(worker_link, drops_events_of_sessions_that_left)
{
    struct worker_link_sessions *link = NULL;
    struct listener listeners[2];
    set_up(listeners, 2, &link);
    const struct worker_link_event event = {.kind = WORKER_LINK_OPENED,
                                            .session_id = listeners[0].id};
    listeners[0].leave_on_event = 1;
    cr_expect_eq(worker_link_dispatch(link, &event), 1);
    cr_expect_eq(worker_link_dispatch(link, &event), 0);
    cr_expect_eq(worker_link_count(link), 1);
    worker_link_leave(link, &listeners[1].id);
    worker_link_close(&link);
}

Test(worker_link, tells_everyone_once_that_it_broke)
{
    struct worker_link_sessions *link = NULL;
    struct listener listeners[50];
    set_up(listeners, 50, &link);
    for (uint32_t i = 0; i < 50; i += 5)
        listeners[i].join_again = 1; /* the next connection */
    worker_link_break_all(link, "gone");
    for (uint32_t i = 0; i < 50; i++)
        cr_expect_eq(listeners[i].broken_count, 1);
    cr_expect_eq(worker_link_count(link), 10);
    for (uint32_t i = 0; i < 50; i += 5)
        worker_link_leave(link, &listeners[i].id);
    worker_link_close(&link);
}

Test(worker_link, takes_a_bounded_number_of_sessions)
{
    struct worker_link_sessions *link = NULL;
    struct hop_session_id id = {{0}};
    cr_assert_eq(worker_link_open(&link), ODSI_OK);
    for (uint32_t i = 0; i <= LIMIT_SESSIONS_MAX; i++) {
        memcpy(id.bytes, &i, sizeof i);
        cr_expect_eq(worker_link_join(link, &id, &handler, NULL),
                     i < LIMIT_SESSIONS_MAX ? ODSI_OK : ODSI_ERR_BUSY);
    }
    for (uint32_t i = 0; i < LIMIT_SESSIONS_MAX; i++) {
        memcpy(id.bytes, &i, sizeof i);
        worker_link_leave(link, &id);
    }
    worker_link_close(&link);
}
